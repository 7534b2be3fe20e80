import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dnal_nni.modules.gates import GateState, ScaledSigmoidGate


def soft(s: list[float], delta: float) -> ScaledSigmoidGate:
    gate = ScaledSigmoidGate(len(s)).double()
    gate.s.data = torch.tensor(s, dtype=torch.float64)
    gate.s.requires_grad_(True)
    gate.delta.fill_(delta)
    gate.state = GateState.SOFT
    return gate


@given(s=st.floats(-3, 3), delta=st.floats(1, 100))
def test_value_and_derivative_follow_the_closed_form(s: float, delta: float) -> None:
    gate = soft([s], delta)
    g = gate()
    g.sum().backward()
    expected = 1 / (1 + math.exp(-delta * s))
    assert g.item() == pytest.approx(expected, rel=1e-12)
    assert gate.s.grad is not None
    assert float(gate.s.grad) == pytest.approx(delta * expected * (1 - expected), rel=1e-9, abs=1e-15)


def test_states() -> None:
    gate = ScaledSigmoidGate(3)
    assert gate().tolist() == [1, 1, 1]
    gate.harden(torch.tensor([True, False, True]))
    assert gate().tolist() == [1, 0, 1]
    assert gate.delta.shape == () and "delta" in dict(gate.named_buffers())


def test_a_copy_of_the_model_uses_its_own_gates(small: torch.nn.Module, x: torch.Tensor) -> None:
    from dnal_nni.channels.groups import find_groups
    from dnal_nni.surgery.inject import attach, detach

    groups = find_groups(small, x)
    gates = {g.name: ScaledSigmoidGate(g.channels) for g in groups if g.frozen is None}
    parameters = dict(small.named_parameters())
    dense = small.eval()(x)
    attach(small, groups, gates)
    twin = copy.deepcopy(small)
    for gate in gates.values():
        gate.harden(torch.arange(gate.s.numel()) < 1)
    assert not torch.allclose(small(x), dense)
    assert torch.equal(twin(x), dense)
    detach(twin)
    assert not torch.allclose(small(x), dense)  # taking the gates off the copy leaves the original alone
    detach(small)
    assert torch.equal(small(x), dense)
    assert all(p is parameters[name] for name, p in small.named_parameters())
