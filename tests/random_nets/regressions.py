"""Networks that once failed: `Program`s as the property test prints them, with what was wrong."""

from __future__ import annotations

from .program import Program, op

REGRESSIONS: list[Program] = [
    # of a larger input, positions that its table does not have
    Program((op("conv"), op("read", width=8), op("positions"))),
    # a norm written by hand keeps the memory format: what it runs as has to
    Program((op("conv"), op("own_norm"), op("flatten", form="view"))),
    # rows and columns of one parameter are groups of their own
    Program((op("conv"), op("conv", norm="response"), op("codebook"))),
    # a norm of three channels that is called once more, on one
    Program((op("own_norm"), op("conv", width=1), op("again", which=1)), head="conv"),
    # a mask that fits the heads by luck was verified, others do not run
    Program((op("attention"),)),
    # two channels in ascending order: right for one of the two masks
    Program((op("conv", width=2, norm="batch", act="relu"), op("move", how="sort"))),
    # one channel left has no halves
    Program((op("conv"), op("pool"), op("glu", form="halves"), op("residual", at=2))),
    # an IndexError of torch-pruning
    Program((op("norm"), op("norm"), op("glu", form="halves"), op("concat", other=4)), inputs=(4,)),
    # cannot be copied once it has run with gradients
    Program((op("conv", weight="old_weight_norm"),)),
    # nothing in it has parameters
    Program((op("act"),), head="none"),
    # half of seven channels, or half of what were eight
    Program((op("conv"), op("slice")), head="conv"),
    Program((op("conv", width=5), op("conv", width=5), op("slice", form="constant"))),
    Program(
        (
            op("conv", width=12, norm="group"),
            op("slice", form="pick"),
            op("known", at=1),
            op("functional", form="einsum"),
        )
    ),
    Program((op("conv", width=6), op("concat"), op("concat"), op("slice", form="strided"))),
    Program(
        (op("conv", width=5), op("slice"), op("squeeze", at=3), op("conv", at=1, padding="reflect")), inputs=(4, 4)
    ),
    # parts that are fewer, or of other sizes, once channels are gone
    Program((op("conv", width=5), op("split"))),
    Program((op("conv"), op("split", parts=3))),
    Program((op("conv"), op("split", parts=3), op("conv"))),
    Program((op("conv"), op("shuffle", groups=4), op("act", at=1))),
    # statistics of a single open channel, and what batch statistics make of their rounding
    Program((op("conv", width=5), op("norm", kind="layer", affine=False), op("conv", norm="batch"))),
    # a module called once more, on channels of another layer
    Program(
        (op("norm", kind="group_one", affine=False), op("transposed"), op("squeeze"), op("conv"), op("again", which=3))
    ),
    # training moves what its weight is divided by
    Program((op("conv", kernel=1, weight="spectral_norm"),)),
    Program((op("conv", norm="batch", weight="spectral_norm"),), training=False),
]
