"""Many short trainings of one small network at once on one GPU (or one after the other on a CPU).

A small network leaves a GPU idle: a training step is hundreds of tiny kernels. So every step is one CUDA graph, several
runs take turns on streams of their own, and nothing per step happens in Python but the replay. (ResNet-20, batch 128,
bf16 on an H100: 10.2 ms a step in eager mode, 3.3 ms as a graph, 1.2 ms a step with ten runs at once; torch.compile
takes that to 1.1 ms, less than it costs to compile.) A network that has lost channels is trained in its full shape with
the gates of those channels at 0: the same function as the cut network's, gradients and norm statistics included (that
is what `DNALPruner.speedup` checks), up to the rounding of sums; odd widths are slower than full ones here. The cut
network itself is what the benchmark evaluates in the end.
"""

from __future__ import annotations

import concurrent.futures
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from cifar_data import augmented
from torch import Tensor, nn

from dnal_nni import DNALPruner
from dnal_nni.modules.gates import AffineGate

WARM_UP_STEPS = 3  # ordinary steps ahead of a CUDA graph
TEMPERATURE = 4.0  # of soft labels (Hinton et al., arXiv 1503.02531)

Weights = dict[str, Tensor]


class Data(NamedTuple):
    """One split of a data set, on the device."""

    pixels: Tensor  # uint8 [images, 32, 32, 1 or 3]
    labels: Tensor  # int64 [images]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flips: bool

    def to(self, device: str) -> Data:
        return self._replace(pixels=self.pixels.to(device), labels=self.labels.to(device))


class Net:
    """A network whose norms' weights and biases are multiplied by gates, as a function of its tensors.

    Args:
        pruner: holds the network with gates attached; every gate must act on norms.
        device: "cpu" or "cuda".
        precision: "bf16" or "fp32", of the forward pass.
    """

    def __init__(self, pruner: DNALPruner, device: str, precision: str) -> None:
        model = pruner.bound_model
        offsets, total = {}, 0
        for gate in pruner.gates.values():
            offsets[id(gate)] = total
            total += gate.s.numel()
        if any(group.site != "norm" for group in pruner.plan.active):
            raise SystemExit("this network has gates that do not act on norms: not supported here")
        self.units = total
        self.sites: dict[str, Tensor] = {}  # parameter -> index into cat(gates, 1)
        for path, module in model.named_modules():
            if isinstance(module, AffineGate):
                index = torch.cat([torch.arange(g.s.numel()) + offsets[id(g)] for g in module.gates])
                index = torch.cat([index, torch.tensor([total])])[module.index.cpu()]
                norm = path.rpartition(".")[0]
                self.sites |= dict.fromkeys((f"{norm}.weight", f"{norm}.bias"), index.to(device))
        pruner.unwrap_model()
        self.template = model.to(device, memory_format=torch.channels_last)
        self.trained = {name for name, _ in model.named_parameters()}
        self.norms = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
        self.device, self.precision = device, precision

    def logits(self, weights: Weights, g: Tensor, images: Tensor) -> Tensor:
        """Forward pass at gates ``g`` (float ``[units]``); norm statistics in ``weights`` move in train mode."""
        extended = torch.cat([g, g.new_ones(1)])
        gated = {name: weights[name] * extended.index_select(0, index) for name, index in self.sites.items()}
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.precision == "bf16", cache_enabled=False):
            return torch.func.functional_call(self.template, {**weights, **gated}, (images,))

    def loss(
        self, weights: Weights, g: Tensor, images: Tensor, labels: Tensor, teacher: Weights | None = None
    ) -> Tensor:
        """Cross entropy; with a teacher, half of it and half of the divergence from the teacher's soft labels."""
        logits = self.logits(weights, g, images).float()
        loss = F.cross_entropy(logits, labels)
        if teacher is None:
            return loss
        with torch.no_grad():
            self.template.eval()
            aim = self.logits(teacher, torch.ones_like(g), images).float()
            self.template.train()
        soft, aim = (F.log_softmax(x / TEMPERATURE, 1) for x in (logits, aim))
        return 0.5 * (loss + TEMPERATURE**2 * F.kl_div(soft, aim, reduction="batchmean", log_target=True))

    def normalised(self, pixels: Tensor, data: Data) -> Tensor:
        """uint8 [n, 32, 32, c] -> [n, 3, 32, 32] in channels_last; a grey image becomes three equal channels."""
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        channels = [(pixels[..., i].float() - 255 * m) / (255 * s) for i, (m, s) in enumerate(zip(data.mean, data.std))]
        images = torch.stack(channels * (3 // len(channels)), -1).to(dtype)
        return images.permute(0, 3, 1, 2)

    @torch.no_grad()
    def accuracy(self, weights: Weights, g: Tensor, data: Data) -> Generator[None, None, float]:
        """Top-1 in per cent."""
        right = torch.zeros((), device=self.device)
        self.template.eval()
        for pixels, labels in zip(data.pixels.split(2000), data.labels.split(2000)):
            right += (self.logits(weights, g, self.normalised(pixels, data)).argmax(1) == labels).sum()
        self.template.train()
        yield from finished(self.device)
        return 100 * float(right) / len(data.labels)

    @torch.no_grad()
    def recalibrate(self, weights: Weights, g: Tensor, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Running statistics of the norms: plain means over some batches."""
        norms = [m for m in self.template.modules() if isinstance(m, nn.BatchNorm2d)]
        for count, (images, _) in enumerate(batches):
            for norm in norms:
                norm.momentum = 1 / (count + 1)
            self.logits(weights, g, images)
        for norm in norms:
            norm.momentum = 0.1


def finished(device: str) -> Generator[None, None, None]:
    """Let the other runs go on until this stream has done what was asked of it."""
    if device == "cuda":
        event = torch.cuda.Event()
        event.record()
        while not event.query():
            yield


def batches(net: Net, data: Data, size: int, seed: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A few augmented batches (float [size, 3, 32, 32], int64 [size])."""
    generator = torch.Generator(net.device).manual_seed(seed)
    rows = torch.randperm(len(data.labels), generator=generator, device=net.device)[: size * count]
    for part in rows.split(size):
        yield net.normalised(augmented(data.pixels[part], generator, flips=data.flips), data), data.labels[part]


class Training:
    """SGD on the weights of one run; ``steps()`` does one step between any two yields.

    Args:
        net: the network.
        weights: all parameters and buffers by name; trained in place.
        g: the gates, float ``[units]``; constant unless ``architecture`` moves them.
        data, batch_size, seed: what the batches are; every epoch's order and crops come from the seed and its number.
        lr: the learning rate of every step.
        first_epoch: number of the first epoch, for its order and crops.
        weight_decay: of all parameters.
        regularise: adds to the gradients of the weights.
        architecture: called after each step with ``g`` (its gradient in ``g.grad``) and the number of the next step
            (int64 [1]); moves ``g``.
        frozen: whether the weights stand still.
        between: called once, ahead of the step with this number.
        teacher: the uncut network's tensors, which gives soft labels.
    """

    def __init__(
        self,
        net: Net,
        weights: Weights,
        g: Tensor,
        data: Data,
        batch_size: int,
        seed: int,
        lr: list[float],
        *,
        first_epoch: int = 0,
        weight_decay: float = 5e-4,
        regularise: Callable[[Weights], None] | None = None,
        architecture: Callable[[Tensor, Tensor], None] | None = None,
        frozen: bool = False,
        between: tuple[int, Callable[[], None]] | None = None,
        teacher: Weights | None = None,
    ) -> None:
        self.net, self.weights, self.g, self.data, self.size, self.seed = net, weights, g, data, batch_size, seed
        self.first_epoch, self.regularise, self.architecture = first_epoch, regularise, architecture
        self.frozen, self.between, self.teacher = frozen, between, teacher
        self.count = len(lr)
        self.lr = torch.tensor(lr, dtype=torch.float32, device=net.device)
        self.time = torch.zeros(1, dtype=torch.int64, device=net.device)
        self.per_epoch = len(data.labels) // batch_size
        self.parameters = [p for name, p in weights.items() if name in net.trained]
        self.cuda = net.device == "cuda"
        self.rate = torch.zeros((), device=net.device) if self.cuda else 0.0
        self.optimizer = torch.optim.SGD(
            self.parameters,
            self.rate,
            momentum=0.9,
            nesterov=True,
            weight_decay=weight_decay,
            **({"fused": True} if self.cuda else {}),  # torch 2.2 does not have it
        )
        self.pixels = torch.empty_like(data.pixels)
        self.labels = torch.empty_like(data.labels)
        self.rows = torch.arange(batch_size, device=net.device)

    def _shuffle(self, epoch: int) -> None:
        generator = torch.Generator(self.net.device).manual_seed(self.seed * 1000 + self.first_epoch + epoch)
        order = torch.randperm(len(self.labels), generator=generator, device=self.net.device)
        start = 0
        for part in order.split(10_000):  # the indices of a whole epoch would take gigabytes
            rows = slice(start, start + len(part))
            self.pixels[rows] = augmented(self.data.pixels[part], generator, flips=self.data.flips)
            self.labels[rows] = self.data.labels[part]
            start += len(part)

    def _step(self) -> None:
        rows = self.time.remainder(self.per_epoch) * self.size + self.rows
        images = self.net.normalised(self.pixels.index_select(0, rows), self.data)
        labels = self.labels.index_select(0, rows)
        rate = self.lr.index_select(0, self.time)[0]
        if isinstance(self.rate, Tensor):
            self.rate.copy_(rate)
        else:
            self.optimizer.param_groups[0]["lr"] = float(rate)
        self.g.grad = None
        self.optimizer.zero_grad(set_to_none=True)
        self.net.loss(self.weights, self.g, images, labels, self.teacher).backward()
        if not self.frozen:
            if self.regularise is not None:
                with torch.no_grad():
                    self.regularise(self.weights)
            self.optimizer.step()
        self.time.add_(1)
        if self.architecture is not None:
            with torch.no_grad():
                self.architecture(self.g, self.time)

    def steps(self) -> Generator[None, None, None]:
        self.net.template.train()
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.g.requires_grad_(self.architecture is not None)
        graph: torch.cuda.CUDAGraph | None = None
        for step in range(self.count):
            if step % self.per_epoch == 0:
                self._shuffle(step // self.per_epoch)
            if self.cuda and step == WARM_UP_STEPS:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                    self._step()
            if self.between is not None and step == self.between[0]:
                self.between[1]()
            if graph is not None:
                graph.replay()
            else:
                self._step()
            yield
        yield from finished(self.net.device)
        for parameter in self.parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        self.g.requires_grad_(False)
        self.g.grad = None


def offload(pool: concurrent.futures.Executor, function: Callable[..., Any], *args: Any) -> Generator[None, None, Any]:
    """Call a function in another process and let the other runs go on meanwhile."""
    future = pool.submit(function, *args)
    while not future.done():
        yield
    return future.result()


def run_all(
    jobs: Iterable[tuple[Any, Generator[None, None, dict[str, Any]]]],
    lanes: int,
    device: str,
    done: Callable[[Any, dict[str, Any]], None],
) -> None:
    """Work on ``lanes`` jobs at a time, a step of each in turn; ``done(name, result)`` as each ends."""
    waiting = iter(jobs)
    active: list[tuple[Any, Generator[None, None, dict[str, Any]], torch.cuda.Stream | None]] = []
    streams = [torch.cuda.Stream() if device == "cuda" else None for _ in range(lanes)]
    while True:
        while streams and (job := next(waiting, None)) is not None:
            active.append((*job, streams.pop()))
        if not active:
            return
        for entry in list(active):
            name, generator, stream = entry
            try:
                with torch.cuda.stream(stream):
                    next(generator)
                continue
            except StopIteration as end:
                result = end.value
            except Exception as error:  # one method's failure must not cost the other runs
                result = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
            active.remove(entry)
            streams.append(stream)
            done(name, result)
        time.sleep(0)  # the threads that wait for other processes
