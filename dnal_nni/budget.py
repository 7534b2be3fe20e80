"""What a network costs, and what it may cost."""

from __future__ import annotations

import dataclasses
import sys

from .arguments import told_of_names
from .errors import DNALError
from .moved import names_of

__getattr__ = names_of("budget")


@dataclasses.dataclass(frozen=True)
class Complexity:
    """Cost of one forward pass on one example input.

    Attributes:
        flops: fvcore's count for the whole batch of the input: one fused multiply-add is one flop.
        params: number of parameters.
        latency: milliseconds of a forward pass, where a budget asked for it (:mod:`dnal_nni.cost.latency`).
        uncounted: operations that cost, but that fvcore cannot count, by name.
    """

    flops: int
    params: int
    latency: float | None = None
    uncounted: tuple[str, ...] = ()


@told_of_names
@dataclasses.dataclass(frozen=True)
class Budget:
    """What the compressed network may cost. Of several limits, all hold, and the tightest is met.

    Up to 1 a value is the fraction to keep, above 1 an absolute number.

    Args:
        flops: fvcore's count (one multiply-add is one flop).
        params: number of parameters.
        latency: milliseconds of a forward pass on the dummy input, on the device, and with the number of threads and
            the autocast, with which the pruner is made (of a network faster than 1 ms: the fraction).
    """

    flops: float | None = None
    params: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        if not self.limits:
            raise DNALError("Budget needs flops=, params= or latency=, for example Budget(flops=0.5)")
        for kind, value in self.limits.items():
            ok = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= sys.float_info.max
            if not ok:
                raise DNALError(
                    f"Budget({kind}={value!r}): must be a number > 0; up to 1 it is the fraction to keep, above 1 an "
                    "absolute number"
                )
        for kind, value in self.limits.items():  # all are numbers
            if 1 < value <= 100 and kind != "latency":  # of which a network may well take 50 ms
                raise DNALError(
                    f"{self}: {value:g} %? write {value / 100:g}; above 1 it is the number of {kind} to keep, and no "
                    "network has so few"
                )

    def __str__(self) -> str:
        """As it was written."""
        return f"Budget({', '.join(f'{kind}={value:.15g}' for kind, value in self.limits.items())})"

    @property
    def limits(self) -> dict[str, float]:
        """What is limited, and to what: by the names of the arguments."""
        return {kind: value for kind, value in vars(self).items() if value is not None}

    def fractions(self, dense: Complexity) -> dict[str, float]:
        """The fraction of ``dense`` that each limit keeps; an error where it is more than there is."""
        kept = {}
        for kind, value in self.limits.items():
            whole = getattr(dense, kind)
            if value > 1 and value > whole:
                has = f"{whole:.3g} ms" if kind == "latency" else whole
                raise DNALError(f"{self} is more than the model has ({has}): give less, or a fraction up to 1")
            kept[kind] = value / whole if value > 1 else value
        return kept
