"""Random networks for hypothesis: what is drawn, and how."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from . import blocks, channels, heads, kinds, sizes, spatial  # their ingredients register themselves
from .layers import SOME
from .program import INGREDIENTS, Network, Op, Program, op, run, runs

__all__ = ["Network", "Program", "op", "programs", "run", "runs"]
__all__ += ["blocks", "channels", "heads", "kinds", "sizes", "spatial"]

BACK = st.sampled_from((0, 0, 0, 0, 1, 2, 3))


def drawn(name: str, **fixed: st.SearchStrategy[Any]) -> st.SearchStrategy[Op]:
    known = INGREDIENTS[name]
    other = st.integers(1, 4) if known.arity > 1 else st.just(1)
    return st.builds(op, st.just(name), at=BACK, other=other, **{**known.options, **fixed})


def any_op() -> st.SearchStrategy[Op]:
    names = [name for name, known in INGREDIENTS.items() for _ in range(known.often)]
    table = {name: drawn(name) for name in INGREDIENTS}
    return st.sampled_from(names).flatmap(table.__getitem__)


PLAIN: dict[str, st.SearchStrategy[Any]] = dict(
    norm=st.sampled_from((None, "batch")), act=st.sampled_from((None, "relu"))
)


def plain_op() -> st.SearchStrategy[Op]:
    """Steps after which it is beyond doubt what a closed gate computes: zeros at the input of every reader."""
    return st.one_of(
        drawn("conv", **PLAIN, groups=st.just("one"), weight=st.just("plain")),
        drawn("conv", **PLAIN, groups=st.just("depthwise"), weight=st.just("plain"), bias=st.just(False)),
        drawn("residual", norm=st.just("batch"), act=PLAIN["act"], drop=st.just(0.0)),
        drawn("meet", how=st.just("add")),
        drawn("concat"),
        drawn("pool", kind=st.sampled_from(("max", "avg", "adaptive", "mean"))),
        drawn("act", kind=st.just("relu")),
        drawn("linear", **PLAIN),
        drawn("flatten"),
    )


@st.composite
def programs(draw: st.DrawFn, plain: bool = False) -> Program:
    """A random program of up to ten steps; ``plain``: of :func:`plain_op` only."""
    dims = draw(st.sampled_from((2, 2, 2, 1, 3)))
    first = drawn("conv", **(PLAIN if plain else {}), groups=st.just("one"), weight=st.just("plain"))
    ops = draw(st.lists(plain_op() if plain else any_op(), min_size=2, max_size=9))
    return Program(
        (draw(first), *ops),
        inputs=draw(st.sampled_from(((3,), (3,), (3,), (4,), (3, 4), (4, 4)))),
        dims=dims,
        size=4 if dims == 3 else draw(st.sampled_from((8, 6, 4))),
        batch=draw(st.sampled_from((2, 2, 1, 3))),
        head=draw(st.sampled_from(("linear", "linear", "conv", "none"))),
        returns=draw(st.sampled_from(("tensor", "tuple", "dict", "dataclass", "nested"))),
        also=() if draw(st.sampled_from((True, True, False))) else draw(st.sampled_from(((1,), (3,), (0, 2)))),
        frozen=draw(st.sampled_from(("nothing", "nothing", "first half", "all"))),
        keywords=draw(SOME),
        channels_last=draw(st.sampled_from((False, False, True))),
        training=draw(st.sampled_from((True, False))),
        seed=draw(st.integers(0, 99)),
    )
