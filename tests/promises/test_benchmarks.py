"""The benchmark trains in another form than a user does: that it is the same search, and the same network."""

import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

peers = pytest.importorskip("peers")
methods = pytest.importorskip("methods")
cuts = pytest.importorskip("cuts")

STEPS, BATCH, LR = 30, 16, 0.05
WIDE = "AVX512" in torch.backends.cpu.get_cpu_capability()  # processors whose oneDNN takes narrow layers


@pytest.fixture
def convolutions_that_do_not_crash() -> Iterator[None]:
    """Without AVX-512, oneDNN's backward pass of strided 1x1 convolutions of few channels crashes (docs/howto.md)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about GPUs, from torch itself
        with torch.backends.mkldnn.flags(enabled=WIDE):
            yield


def random_data() -> "peers.Data":
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (10 * BATCH, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return peers.Data(pixels, torch.randint(0, 10, (10 * BATCH,), generator=generator), (0.5,) * 3, (0.25,) * 3, True)


@pytest.mark.usefixtures("convolutions_that_do_not_crash")
def test_the_engine_runs_the_library_s_search_and_trains_the_cut_network() -> None:
    job = peers.Job("", "resnet20", 0.25, 0.5, "dnal", 0)
    data = random_data()
    net = peers.Net(peers.gated(peers.network(job), job.budget), "cpu", "fp32")
    state = peers.network(job).state_dict()

    # the benchmark's form
    weights = dict(peers.network(job).to(memory_format=torch.channels_last).state_dict())
    objective = peers.gated(peers.network(job), job.budget).plan.objective
    scores = methods.Scores(objective, methods.start_scores(job, state), STEPS)
    g, architecture, settle = methods.gate_steps(scores, STEPS)
    training = methods.Training(
        net, weights, g, data, BATCH, 7, [LR] * STEPS, architecture=architecture, between=(scores.moving, settle)
    )
    batches = []
    for number, _ in enumerate(training.steps()):
        rows = slice(number % 10 * BATCH, (number % 10 + 1) * BATCH)
        batches.append((net.normalised(training.pixels[rows], data), training.labels[rows].clone()))
    keep = methods.cut_by_score(job, scores.value, scores.floor)

    # the user's form
    model = peers.network(job).to(memory_format=torch.channels_last).train()
    pruner = peers.gated(model, job.budget)
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, nesterov=True, weight_decay=5e-4)
    with pruner.search(STEPS, optimizer=optimizer, progress=False) as search:
        for images, labels in batches:
            search.step(F.cross_entropy(model(images), labels))
    assert torch.allclose(search.score, scores.value, atol=1e-6)
    assert torch.allclose(model.conv1.weight, weights["conv1.weight"], atol=1e-4)

    # fine-tuning in the full shape with hard gates, and the cut network's; later a ReLU is bound to flip somewhere, and
    # from there on both go their own ways
    small = peers.physical(job, weights, keep)[0].to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(small.parameters(), LR, momentum=0.9, nesterov=True, weight_decay=5e-4)
    training = methods.Training(net, weights, keep.float(), data, BATCH, 8, [LR] * 2)
    for number, _ in enumerate(training.steps()):
        rows = slice(number * BATCH, (number + 1) * BATCH)
        optimizer.zero_grad()
        F.cross_entropy(small(net.normalised(training.pixels[rows], data)), training.labels[rows]).backward()
        optimizer.step()
    trained = peers.physical(job, weights, keep)[0]
    for (name, a), b in zip(small.named_parameters(), trained.parameters()):
        assert torch.allclose(a, b, atol=1e-6), name


def test_the_engine_runs_the_library_s_paper_search() -> None:
    """Its first steps; then gates are steep, rounding decides, and both go their own ways."""
    job = peers.Job("", "resnet20", 0.25 if WIDE else 0.5, 0.5, "dnal_paper", 0)
    data = random_data()
    net = peers.Net(peers.gated(peers.network(job), job.budget), "cpu", "fp32")
    weights = dict(peers.network(job).to(memory_format=torch.channels_last).state_dict())
    scores = methods.PaperScores(net.units, STEPS, 0.01)
    g, architecture = methods.paper_steps(scores)
    training = methods.Training(net, weights, g, data, BATCH, 7, [0.0] * STEPS, architecture=architecture, frozen=True)

    model = peers.network(job).to(memory_format=torch.channels_last).train()
    pruner = peers.gated(model, job.budget, preset="paper", lambda_=0.01)
    with pruner.search(STEPS, progress=False) as search:
        for number, _ in zip(range(4), training.steps()):
            rows = slice(number * BATCH, (number + 1) * BATCH)
            images = net.normalised(training.pixels[rows], data)
            search.step(F.cross_entropy(model(images), training.labels[rows]))
            assert torch.allclose(search.score, scores.value, atol=1e-6)
    assert float(search.score.std()) > 5e-4
