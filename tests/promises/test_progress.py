"""Phases of the work are told through logging."""

import logging
import re

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from dnal_nni import Budget
from dnal_nni.plan import Plan
from dnal_nni.progress import phase
from dnal_nni.session import Session


def test_a_phase_says_that_it_begins_and_how_long_it_took(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dnal_nni"), phase("thinking"):
        assert [record.getMessage() for record in caplog.records] == ["thinking ..."]
    assert [(record.name, record.getMessage()) for record in caplog.records][1] == ("dnal_nni", "thinking: 0.0 s")


def test_one_that_fails_does_not_say_that_it_is_done(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dnal_nni"), pytest.raises(ValueError), phase("thinking"):
        raise ValueError
    assert len(caplog.records) == 1


def test_a_search_says_what_it_does(
    small: nn.Module, x: Tensor, batches: list[tuple[Tensor, Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dnal_nni")
    session = Session(small, Plan.of(small, x, budget=Budget(flops=0.5)))
    with session.search(len(batches), progress=False) as search:
        for images, labels in batches:
            search.step(F.cross_entropy(small(images), labels))
    session.speedup()
    said = [re.sub(r"\d+\.\d s", "S", record.getMessage()) for record in caplog.records]
    reading = ["reading which channels go together", "proving what can be cut", "counting every layer"]
    cutting = ["choosing what goes", "cutting, and comparing with the gated network"]
    between = [line for line in said if line.startswith("searching, 8 steps: cost is ")]
    assert len(between) == 1
    told = [line for what in reading for line in (f"{what} ...", f"{what}: S")]
    between += ["searching, 8 of 8 steps: S"]
    assert said == told + between + [line for what in cutting for line in (f"{what} ...", f"{what}: S")]
