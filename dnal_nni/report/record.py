"""What a compression did: a dataclass that prints as a table and exports as JSON, HTML and a picture."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..budget import Complexity
from ..errors import DNALError


@dataclasses.dataclass(frozen=True)
class GroupReport:
    """One channel group.

    Attributes:
        units: before.
        kept: after.
        site: where its gate acts.
        layers: how many are cut with it.
        frozen: the reason why it was left whole, or None.
        asked: by layer, the units that its mask asked to remove, where the masks of coupled layers disagree.
    """

    name: str
    units: int
    kept: int
    site: str
    layers: int
    frozen: str | None
    asked: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Report:
    """Before and after; ``accuracy`` and ``latency_ms`` are (before, after), filled in by whoever measured them.

    Attributes:
        targets: the budget: by "flops", "params" or "latency", the fraction of the dense cost to keep.
        decided: fraction of the gates outside of [0.05, 0.95] at the end of the search, ahead of any threshold.
        max_abs_diff: largest difference between hard-gated and sliced network (eval and train), in the model's dtype.
        relative_diff: the same relative to the largest output, in float64 where the model runs in it.
        masked_diff: largest difference between NNI's masked model, which leaves the norms of masked channels on, and
            the cut one, in eval mode, relative to the largest output.
        seconds: what took how long, by name.
        history: over the search, some 100 entries: step, delta, expected cost (of the dense one), loss, and the number
            of gates in each of 20 bins from 0 to 1 ("gates").
        command: what was run.
        versions: of the packages that it ran with.
        settings: of the command.
    """

    before: Complexity
    after: Complexity
    groups: list[GroupReport]
    targets: dict[str, float] = dataclasses.field(default_factory=dict)
    decided: float | None = None
    max_abs_diff: float | None = None
    relative_diff: float | None = None
    masked_diff: float | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    accuracy: tuple[float, float] | None = None
    latency_ms: tuple[float, float] | None = None
    command: str | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(what, before, after, after / before), ready to print."""
        rows = []
        pairs: list[tuple[str, float, float, str]] = [
            ("FLOPs (M)", self.before.flops / 1e6, self.after.flops / 1e6, ".3f"),
            ("parameters (M)", self.before.params / 1e6, self.after.params / 1e6, ".4f"),
        ]
        if self.latency_ms is not None:
            pairs.append(("latency (ms)", *self.latency_ms, ".2f"))
        for name, before, after, form in pairs:
            rows.append((name, f"{before:{form}}", f"{after:{form}}", f"{after / before:.1%}"))
        if self.accuracy is not None:
            change = self.accuracy[1] - self.accuracy[0]
            rows.append(("accuracy (%)", f"{self.accuracy[0]:.2f}", f"{self.accuracy[1]:.2f}", f"{change:+.2f}"))
        return rows

    def __str__(self) -> str:
        lines = [f"{'':16}{'before':>12}{'after':>12}{'':>10}"]
        lines += [f"{name:16}{before:>12}{after:>12}{ratio:>10}" for name, before, after, ratio in self.rows()]
        if self.targets:
            lines.append("target: " + ", ".join(f"{value:.1%} of the {kind}" for kind, value in self.targets.items()))
        if self.max_abs_diff is not None:
            exact = "" if self.relative_diff is None else f"; relative, in float64: {self.relative_diff:.1e}"
            lines.append(f"max |gated - sliced|, eval and train mode: {self.max_abs_diff:.1e}{exact}")
        if self.masked_diff is not None:
            lines.append(f"max |masked - sliced|, relative: {self.masked_diff:.1e} (masks leave the norms' biases on)")
        name_width = max([len(g.name) for g in self.groups], default=0) + 2
        lines.append(f"\n{'channel group':{name_width}}{'before':>8}{'after':>8}")
        for g in self.groups:
            why = f"  left whole: {g.frozen}" if g.frozen else ""
            if g.asked:
                why += "  asked to remove: " + ", ".join(f"{layer} {count}" for layer, count in g.asked.items())
            lines.append(f"{g.name:{name_width}}{g.units:>8}{g.kept:>8}{why}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_html(self) -> str:
        """One self-contained page: table, search, widths, layers left whole; no script, nothing from the network."""
        from .page import page

        return page(self)

    def to_tensorboard(self, folder: str | os.PathLike[str]) -> None:
        """The history as scalars and gate histograms for TensorBoard (needs tensorboard)."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise DNALError("to_tensorboard needs tensorboard: pip install tensorboard") from error
        with SummaryWriter(os.fspath(folder)) as writer:
            for entry in self.history:
                for name in ("cost", "delta", "loss"):
                    if entry.get(name) is not None:
                        writer.add_scalar(f"search/{name}", entry[name], entry["step"])
                if entry.get("gates"):
                    _add_histogram(writer, entry["gates"], entry["step"])

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """The report that :meth:`to_dict` gave.

        Raises:
            DNALError: ``values`` is something else.
        """
        try:
            values = dict(values)
            for name in ("before", "after"):
                values[name] = Complexity(**values[name])
            values["groups"] = [GroupReport(**group) for group in values["groups"]]
            for name in ("accuracy", "latency_ms"):
                values[name] = tuple(values[name]) if values.get(name) is not None else None
            report = cls(**values)
            str(report)  # numbers where numbers belong
            return report
        except (KeyError, TypeError, ValueError) as error:
            raise DNALError(f"this is no report of dnal_nni: {error}") from error

    def plot_widths(self, path: str | os.PathLike[str]) -> None:
        """Bars of every group's width before and after, as a picture (needs matplotlib)."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(max(6.0, 0.35 * len(self.groups)), 4), layout="constrained")
        axes = figure.add_subplot(ylabel="channels")
        places = range(len(self.groups))
        axes.bar(places, [g.units for g in self.groups], color="lightgrey", label="before")
        axes.bar(places, [g.kept for g in self.groups], color="tab:blue", label="after")
        axes.set_xticks(places, [g.name for g in self.groups], rotation=90, fontsize=8)
        axes.legend()
        figure.savefig(path, dpi=120)


def versions() -> dict[str, str]:
    """Of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("dnal_nni", "torch", "torchvision", "fvcore", "nni"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _add_histogram(writer: Any, counts: list[int], step: int) -> None:
    """Counts in equal bins from 0 to 1."""
    edges = [(i + 1) / len(counts) for i in range(len(counts))]
    middles = [edge - 0.5 / len(counts) for edge in edges]
    total = sum(count * middle for count, middle in zip(counts, middles))
    squares = sum(count * middle**2 for count, middle in zip(counts, middles))
    writer.add_histogram_raw("search/gates", 0.0, 1.0, sum(counts), total, squares, edges, counts, step)
