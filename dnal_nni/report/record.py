"""What a compression did: data that print as a table, and come back from JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, get_type_hints

from ..arguments import checked, fits, shown, words
from ..budget import Complexity
from ..errors import DNALError
from .interventions import Interventions
from .tables import table

NAMES = {"flops": "FLOPs", "params": "parameters"}
_PAIRS = ("accuracy", "latency_ms", "file_bytes")


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

    def asked_text(self) -> str:
        """``asked`` in words."""
        return ", ".join(f"{layer} {count}" for layer, count in self.asked.items())


@dataclasses.dataclass(repr=False)
class Report:
    """What there was, what is left, and how it came about. In a notebook it shows as its page.

    Attributes:
        before: FLOPs, parameters and, where the budget limits it, latency of the uncut network.
        after: of the cut one.
        groups: every channel group of the network.
        targets: the budget: by "flops", "params" or "latency", the fraction of the dense cost to keep.
        decided: fraction of the gates outside of [0.05, 0.95] at the end of the search, ahead of any threshold.
        max_abs_diff: largest difference between what the sliced network returns in its own dtype and what the
            hard-gated one does in float64, in eval mode.
        relative_diff: largest difference of the two relative to the largest output, in float64 where the model runs in
            it, in eval and train mode.
        masked_diff: largest difference between NNI's masked model, which leaves the norms of masked channels on, and
            the cut one, in eval mode, relative to the largest output.
        seconds: what took how long, by name.
        history: over the search, some 100 entries: step, delta, expected cost (of the dense one), loss, and the number
            of gates in each of 20 bins from 0 to 1 ("gates").
        accuracy: (before, after) in per cent, filled in by whoever measured it.
        latency_ms: (before, after) of a forward pass, likewise.
        command: what was run.
        versions: of the packages that it ran with.
        settings: of the command.
        accuracy_cut: in per cent, after the cut and ahead of fine-tuning.
        file_bytes: (before, after) of all parameters and buffers: what a file of the network takes.
        layer_flops: by layer, fvcore's count (before, after).
        notes: what else a reader should know, a sentence each.
        interventions: what people decided, and what was decided for them; None in reports of masks and of version 0.1.
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
    accuracy_cut: float | None = None
    file_bytes: tuple[int, int] | None = None
    layer_flops: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    interventions: Interventions | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _PAIRS and isinstance(value, list):
            value = tuple(value)  # as JSON has it
        kind = _kinds().get(name)
        if kind is None and (close := difflib.get_close_matches(name, _kinds(), 1, 0.8)):
            raise DNALError(f"a report has no {name}: did you mean {close[0]}?")
        if kind is not None and not fits(value, kind):
            wanted = "two numbers, (before, after)" if name in _PAIRS else words(kind)
            raise DNALError(f"report.{name} is {shown(value)}: give {wanted}")
        super().__setattr__(name, value)

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """(what, before, after, after / before, change), ready to print."""
        sizes: list[tuple[str, float, float, str]] = [
            ("FLOPs (M)", self.before.flops / 1e6, self.after.flops / 1e6, ".3f"),
            ("parameters (M)", self.before.params / 1e6, self.after.params / 1e6, ".4f"),
        ]
        if self.file_bytes is not None:
            sizes.append(("file (MB)", self.file_bytes[0] / 1e6, self.file_bytes[1] / 1e6, ".3f"))
        if self.latency_ms is not None:
            sizes.append(("latency (ms)", *self.latency_ms, ".2f"))
        rows = []
        for name, before, after, form in sizes:
            kept = after / before if before else 1.0
            rows.append((name, f"{before:{form}}", f"{after:{form}}", f"{kept:.1%}", f"{kept - 1:+.1%}"))
        if self.accuracy is not None:
            whole, tuned = self.accuracy
            for name, value in (("accuracy, not tuned (%)", self.accuracy_cut), ("accuracy (%)", tuned)):
                if value is not None:
                    rows.append((name, f"{whole:.2f}", f"{value:.2f}", "", f"{value - whole:+.2f}"))
        return rows

    def facts(self) -> list[str]:
        """What there is to say beside the numbers, a sentence each."""
        facts = []
        if self.targets:
            limits = [f"{value:.1%} of the {NAMES.get(kind, kind)}" for kind, value in self.targets.items()]
            facts.append(f"target: {', '.join(limits)}")
        if self.max_abs_diff is not None:
            exact = "" if self.relative_diff is None else f"; relative (float64, both modes): {self.relative_diff:.1e}"
            facts.append(f"largest difference of gated and cut network: {self.max_abs_diff:.1e}{exact}")
        if self.masked_diff is not None:
            facts.append(f"of masked and cut network, relative: {self.masked_diff:.1e} (masks leave norms' biases on)")
        if self.after.uncounted:
            facts.append(f"not in the FLOPs, since fvcore cannot count it: {', '.join(self.after.uncounted)}")
        return [*facts, *self.notes]

    def __str__(self) -> str:
        groups = []
        for g in self.groups:
            why = [f"left whole: {g.frozen}"] if g.frozen else []
            why += [f"asked to remove: {g.asked_text()}"] if g.asked else []
            groups.append([g.name, str(g.units), str(g.kept), "  ".join(why)])
        parts = [table(["", "before", "after", "kept", "change"], self.rows()), *self.facts()]
        parts += ["", table(["channel group", "before", "after", ""], groups, "lrrl")]
        if self.interventions is not None:
            parts += ["", table(["decisions", "searched", "by hand"], self.interventions.rows())]
            parts += self.interventions.facts()
        return "\n".join(parts)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{what} {before} -> {after}" for what, before, after, *_ in self.rows())
        cut = sum(group.kept < group.units for group in self.groups)
        return f"<Report: {sizes}; {cut} of {len(self.groups)} channel groups cut; print() shows all of it>"

    @checked
    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        return dataclasses.asdict(self)

    @checked
    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """The report that :meth:`to_dict` gave, also that of an older version.

        Raises:
            DNALError: ``values`` is something else.
        """
        try:
            values = dict(values)
            for name in ("before", "after"):
                size = dict(values[name])
                values[name] = Complexity(**size | {"uncounted": tuple(size.get("uncounted", ()))})
            values["groups"] = [GroupReport(**group) for group in values["groups"]]
            values["layer_flops"] = {name: tuple(pair) for name, pair in values.get("layer_flops", {}).items()}
            if values.get("interventions") is not None:
                values["interventions"] = Interventions(**values["interventions"])
            report = cls(**values)
        except DNALError as error:
            raise DNALError(f"this is no report of dnal_nni: {error}") from error
        except KeyError as error:
            raise DNALError(f"this is no report of dnal_nni: it has no {error}") from error
        except (AttributeError, TypeError, ValueError) as error:
            raise DNALError("this is no report of dnal_nni: its values are not of the right form") from error
        if not all(map(_is_moment, report.history)):
            raise DNALError("this is no report of dnal_nni: its history is not of the right form")
        return report

    @checked
    def to_html(self) -> str:
        """One self-contained page: table, search, widths, layers left whole; no script, nothing from the network."""
        from .page import page

        return page(self)

    def _repr_html_(self) -> str:
        from .page import fragment

        return fragment(self)

    @checked
    def to_tensorboard(self, folder: str | os.PathLike[str]) -> None:
        """The history as scalars and gate histograms for TensorBoard (needs tensorboard)."""
        from .pictures import write_events

        write_events(self, folder)

    @checked
    def plot_widths(self, path: str | os.PathLike[str]) -> None:
        """Bars of every group's width before and after, as a picture (needs matplotlib)."""
        from .pictures import plot_widths

        plot_widths(self, path)


@functools.cache
def _kinds() -> dict[str, Any]:
    """The type of every field of a report."""
    return get_type_hints(Report)


def _is_moment(entry: dict[str, Any]) -> bool:
    """Whether this is an entry of the history."""
    numbers = all(fits(entry.get(name), float | None) for name in ("delta", "cost", "loss"))
    return numbers and fits(entry.get("step"), int) and fits(entry.get("gates"), list[int] | None)


def versions() -> dict[str, str]:
    """Of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("dnal_nni", "torch", "torchvision", "fvcore", "nni"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
