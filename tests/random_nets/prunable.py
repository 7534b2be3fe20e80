"""What must be prunable, by name: a program, and its layers that must not be left whole.

Freezing everything would pass every comparison.
"""

from __future__ import annotations

from torch import nn

from . import kinds
from .heads import REPEATS
from .modules import Dropping
from .program import Program, op
from .sizes import Insisting
from .spatial import FORMS

C = op("conv", norm="batch", act="relu")
LAST = op("conv", width=6)
FIRST = ["conv0.conv"]
PRUNABLE: dict[str, tuple[Program, list[str]]] = {
    "chain": (Program((C, C, LAST)), ["conv0.conv", "conv1.conv", "conv2.conv"]),
    "chain without norms": (Program((op("conv", act="relu"), LAST)), ["conv0.conv", "conv1.conv"]),
    "1d": (Program((C, C), dims=1), ["conv0.conv", "conv1.conv"]),
    "3d": (Program((C, C), dims=3, size=4), ["conv0.conv", "conv1.conv"]),
    "two inputs, dict in, dataclass out": (
        Program((C, op("conv", at=2), op("concat"), LAST), inputs=(3, 4), keywords=True, returns="dataclass"),
        ["conv0.conv", "conv1.conv", "conv3.conv"],
    ),
    "all parameters frozen": (Program((C, C, LAST), frozen="all"), ["conv0.conv", "conv1.conv", "conv2.conv"]),
    "first layers frozen": (Program((C, C, LAST), frozen="first half"), ["conv0.conv", "conv1.conv"]),
    "in eval mode, channels last": (Program((C, LAST), training=False, channels_last=True), FIRST),
    "an intermediate feature is returned": (Program((C, C, LAST), also=(1,), returns="tuple"), ["conv0.conv"]),
    "a batch of one": (Program((C, C, op("pool", kind="mean"), op("linear")), batch=1), ["conv0.conv", "conv1.conv"]),
    "transposed": (Program((C, op("transposed", norm="batch"), LAST)), ["conv0.conv", "transposed1.conv"]),
    "attention that takes its width from the input": (
        Program((C, op("tokens"), op("takes_width", heads=4))),
        ["conv0.conv", "takes_width2.qkv"],
    ),
    "attention that keeps its width": (
        Program((C, op("tokens"), op("takes_width", stored=True))),
        ["conv0.conv", "takes_width2.qkv"],
    ),
    **{
        f"sizes as ints, {form}": (Program((C, op("insisting", form=form), LAST)), ["conv0.conv", "insisting1.layer"])
        for form in Insisting.FORMS
    },
    **{
        f"a recurrent convolution, {'new' if new else 'made'}": (
            Program((C, op("cell", new=new), LAST)),
            ["conv0.conv", "cell1.gates"],
        )
        for new in (False, True)
    },
    "distances to a table": (Program((C, op("codebook"), LAST)), FIRST),
    "tokens that are gathered": (Program((C, op("tokens"), op("chosen"), op("linear"))), FIRST),
    "equalised convolutions": (
        Program((op("equalised"), op("act"), op("equalised", width=6), LAST)),
        ["equalised0.weight", "equalised2.weight", "conv3.conv"],
    ),
    "what cannot be copied": (Program((C, op("locked"), LAST)), ["conv0.conv", "locked1.conv", "conv2.conv"]),
    "a compiled activation": (Program((C, op("compiled", pointwise=True), LAST)), ["conv0.conv", "conv2.conv"]),
    "beside a compiled part": (Program((C, op("compiled"), op("conv"), LAST)), ["conv2.conv", "conv3.conv"]),
    "depthwise": (Program((C, op("conv", groups="depthwise", norm="batch"), LAST)), FIRST),
    "depthwise with a multiplier": (Program((C, op("conv", groups="multiplier"), LAST)), FIRST),
    "grouped": (Program((C, op("conv", groups="some", width=16), LAST)), ["conv0.conv", "conv1.conv"]),
    "grouped by the outputs": (Program((C, op("conv", groups="outputs"), LAST)), FIRST),
    "transposed and grouped": (Program((C, op("transposed", groups="some"), LAST)), ["conv0.conv", "transposed1.conv"]),
    "circular padding": (Program((C, op("conv", padding="circular"), LAST)), ["conv0.conv", "conv1.conv"]),
    "residual": (
        Program((C, op("residual", width=6), LAST)),
        ["conv0.conv", "residual1.body.conv1", "residual1.body.conv2", "conv2.conv"],
    ),
    "residual with projection": (
        Program((C, op("residual", width=6, project=True), LAST)),
        ["conv0.conv", "residual1.body.conv1", "residual1.body.conv2", "residual1.shortcut"],
    ),
    "residual in place": (Program((C, op("residual", inplace=True), LAST)), ["conv0.conv", "residual1.body.conv2"]),
    "stochastic depth": (Program((C, op("residual", drop=0.5), LAST)), ["conv0.conv", "residual1.body.conv1"]),
    **{
        f"random numbers, {form}": (Program((C, op("dropout", kind=form), LAST)), FIRST) for form in Dropping.FORMS
    },
    "dropout": (Program((C, op("dropout"), C, op("dropout", kind="channel"), LAST)), ["conv0.conv", "conv2.conv"]),
    "concat": (Program((C, C, op("concat"), LAST)), ["conv0.conv", "conv1.conv", "conv3.conv"]),
    "concat with itself": (Program((C, op("concat_self", order="xrx"), LAST)), FIRST),
    "concat into groups": (
        Program((C, C, op("concat"), op("conv", groups="some"), LAST)),
        ["conv0.conv", "conv1.conv"],
    ),
    "densenet": (Program((C, op("known", kind="dense"), LAST)), ["conv0.conv", "known1.convs.0", "known1.convs.1"]),
    "product": (Program((C, C, op("meet", how="mul"), LAST)), ["conv0.conv", "conv1.conv"]),
    "sigmoid gate": (Program((C, C, op("meet", how="gate"), LAST)), ["conv0.conv", "conv1.conv"]),
    "glu": (Program((C, op("glu"), LAST)), FIRST),
    "glu by halves": (Program((C, op("glu", form="halves"), LAST)), FIRST),
    "chunk": (
        Program((C, op("split"), op("conv"), op("conv", at=2), op("meet"))),
        ["conv0.conv", "conv2.conv", "conv3.conv"],
    ),
    **{
        f"equal parts, {form}": (
            Program((C, op("split", form=form), op("conv"), op("conv", at=2), op("meet"))),
            ["conv0.conv", "conv2.conv", "conv3.conv"],
        )
        for form in ("tuple", "slices", "tensor_split", "numbered")
    },
    "split by constants": (Program((C, op("split", form="equal"), op("meet"), LAST)), ["conv3.conv"]),
    "split by stored widths": (
        Program((C, op("split", form="stored"), op("conv"), op("conv", at=2), op("concat"), LAST)),
        ["conv0.conv", "conv2.conv", "conv3.conv"],
    ),
    "res2net": (
        Program((C, op("known", kind="res2net"), LAST)),
        ["conv0.conv", "known1.expand", "known1.convs.0", "known1.convs.1", "known1.contract"],
    ),
    "cross-stage partial": (
        Program((C, op("known", kind="csp"), LAST)),
        ["conv0.conv", "known1.expand", "known1.block.0", "known1.mix"],
    ),
    "ghost": (Program((C, op("known", kind="ghost"), LAST)), ["conv0.conv", "known1.primary"]),
    "channel shuffle": (Program((C, op("shuffle"), LAST)), FIRST),
    "channel shuffle behind groups": (
        Program((op("conv", width=24), op("conv", groups="some", width=24), op("shuffle", groups=4), LAST)),
        ["conv0.conv", "conv1.conv"],
    ),
    "channel shuffle by stored numbers": (Program((C, op("shuffle", form="stored"), LAST)), FIRST),
    "shufflenet": (Program((C, op("known", kind="shuffle"), LAST)), ["known1.a"]),
    "view by stored numbers": (Program((C, op("shuffle", form="view"), LAST)), FIRST),
    "pixel shuffle": (Program((op("conv", width=16), op("pixel"), LAST)), FIRST),
    "pixel unshuffle": (Program((op("conv", width=6), op("pixel", up=False), LAST)), FIRST),
    "flatten": (Program((C, op("flatten"), op("linear", act="relu")), size=4), ["conv0.conv", "linear2.linear"]),
    "flatten to a stored size": (Program((C, op("flatten", form="stored"), op("linear")), size=4), ["conv0.conv"]),
    "flatten to a stored size, channels last": (
        Program((C, op("flatten", form="stored, last"), op("linear")), size=4),
        ["conv0.conv"],
    ),
    "flatten by view": (Program((C, op("flatten", form="view"), op("linear")), size=4), ["conv0.conv"]),
    "pooling": (
        Program((C, op("pool"), C, op("pool", kind="avg"), C, op("pool", kind="adaptive"), LAST)),
        ["conv0.conv", "conv2.conv", "conv4.conv"],
    ),
    "upsampling": (Program((C, op("upsample"), C, op("upsample", mode="linear"), LAST), size=2), ["conv0.conv"]),
    "squeeze and excite": (
        Program((C, op("squeeze"), LAST)),
        ["conv0.conv", "squeeze1.reduce", "squeeze1.expand"],
    ),
    "squeeze and excite by linear layers": (
        Program((C, op("squeeze", form="shape"), LAST)),
        ["conv0.conv", "squeeze1.reduce", "squeeze1.expand"],
    ),
    "squeeze and excite by a stored width": (Program((C, op("squeeze", form="stored"), LAST)), ["squeeze1.reduce"]),
    "inverted residual": (
        Program((C, op("known", kind="inverted"), LAST)),
        ["conv0.conv", "known1.body.expand.0", "known1.body.contract.0"],
    ),
    "group norm": (Program((op("conv", norm="group", act="relu"), LAST)), FIRST),
    "group norm of one group": (Program((op("conv", norm="group_one", act="relu"), LAST)), FIRST),
    "group norm behind a residual": (
        Program((C, op("residual", norm="group"), LAST)),
        ["conv0.conv", "residual1.body.conv1", "residual1.body.conv2"],
    ),
    "layer norm over channels": (Program((op("conv", norm="layer", act="gelu"), LAST)), FIRST),
    **(
        {"rms norm over channels": (Program((op("conv", norm="rms"), LAST)), FIRST)}
        if hasattr(nn, "RMSNorm")  # torch 2.4
        else {}
    ),
    "instance norm": (Program((op("conv", norm="instance"), op("norm", kind="instance", tracked=False), LAST)), FIRST),
    "batch norm without affine": (Program((op("conv"), op("norm", affine=False), LAST)), FIRST),
    "transformer MLP": (Program((C, op("tokens", cls=True), op("mlp"))), ["mlp2.expand"]),
    "transformer MLP, its stream": (
        Program((C, op("tokens", cls=True), op("mlp"), op("mlp", scale=True), op("norm", kind="layer"))),
        ["conv0.conv", "mlp2.contract", "mlp3.contract"],
    ),
    "gated MLP": (Program((C, op("tokens"), op("mlp", gated=True))), ["mlp2.expand"]),
    "convnext": (Program((C, op("mlp", scale=True), LAST)), ["conv0.conv", "mlp1.body.expand", "mlp1.body.contract"]),
    "linear layers": (
        Program((op("flatten"), op("linear", norm="batch", act="relu"), op("linear")), size=4),
        ["linear1.linear", "linear2.linear"],
    ),
    "shortcut of option A": (
        Program(
            (C, op("conv", width=12, norm="batch", stride=2), op("pad_channels", at=1, strided=True), op("meet"), LAST)
        ),
        ["conv0.conv", "conv1.conv"],
    ),
    "sigmoid": (Program((op("conv", norm="batch", act="sigmoid"), LAST)), FIRST),
    "plus one": (Program((op("conv", norm="batch", act="plus_one"), LAST)), FIRST),
    "prelu per channel": (Program((op("conv", act="prelu"), LAST)), FIRST),
    "padding with a constant": (Program((C, op("pad"), LAST)), FIRST),
    "layer scale": (Program((C, op("bare", shape="scale"), LAST)), FIRST),
    "parameter (C, 1, 1)": (Program((C, op("bare", shape="C11"), LAST)), FIRST),
    "parameter (1, C, 1, 1)": (Program((C, op("bare", shape="1C11", how="add"), LAST)), FIRST),
    "parameter (1, C, H, W)": (Program((C, op("bare", shape="1CHW", how="add"), LAST)), FIRST),
    "buffer (1, C, 1, 1)": (Program((C, op("bare", shape="1C11", buffer=True), LAST)), FIRST),
    "buffer (C, 1, 1)": (Program((C, op("bare", shape="C11", buffer=True), LAST)), FIRST),
    "scalar parameter": (Program((C, op("bare", shape="scalar"), LAST)), FIRST),
    "coordinates": (Program((C, op("mix", how="coordinates"), LAST)), FIRST),
    "weight norm": (Program((C, op("conv", weight="weight_norm"), LAST)), ["conv0.conv", "conv1.conv"]),
    "old weight norm": (Program((C, op("conv", weight="old_weight_norm"), LAST)), ["conv0.conv", "conv1.conv"]),
    "a standardised weight": (Program((C, op("conv", weight="standardised"), LAST)), ["conv0.conv", "conv1.conv"]),
    **{f"along space, {form}": (Program((C, op("spatial", form=form), LAST)), FIRST) for form in FORMS},
    "functional convolution": (Program((C, op("functional"), LAST)), FIRST),
    "called on its own output": (Program((C, C, op("again"), LAST)), ["conv0.conv", "conv1.conv", "conv3.conv"]),
    "called on two inputs": (
        Program((C, op("conv", at=1), C, op("again", at=2), op("meet"), LAST)),
        ["conv0.conv", "conv1.conv", "conv2.conv"],
    ),
    "checkpointed": (Program((C, op("cut"), LAST)), ["conv0.conv", "cut1.body.0", "cut1.body.2"]),
    "a table of positions": (Program((C, op("positions"), LAST)), ["conv0.conv", "positions1.table"]),
    "a table of positions, tokens": (
        Program((C, op("tokens"), op("positions"), op("mlp"))),
        ["conv0.conv", "positions2.table"],
    ),
    "a module under two names": (Program((C, op("two_names"), LAST)), ["conv0.conv", "two_names1.conv"]),
    "a layer norm by hand": (Program((C, op("own_norm"), LAST)), FIRST),
    **{
        f"{form} over channels": (Program((C, op("added_up", how=form), LAST)), FIRST)
        for form in kinds.ADDED
        if form != "counted"
    },
    "a sum over channels without a norm ahead": (Program((op("conv"), op("added_up"), LAST)), FIRST),
    "queries and keys": (Program((C, op("similar"), LAST)), ["conv0.conv", "similar1.q", "similar1.k"]),
    "normalised queries and keys": (
        Program((C, op("tokens"), op("similar", norm=True), op("linear"))),
        ["similar2.q", "similar2.k"],
    ),
    "a mean that nobody uses": (Program((C, op("unused"), LAST)), FIRST),
    "an LSTM reads it": (Program((C, op("read"), op("linear"))), FIRST),
    "a bidirectional GRU reads it": (Program((C, op("read", form=nn.GRU, both=True), op("linear"))), FIRST),
    "deformable": (Program((C, op("deformable"), op("norm"), LAST)), ["conv0.conv", "deformable1.conv"]),
    "deformable, as a function": (Program((C, op("deformable", function=True), op("norm"), LAST)), FIRST),
    "a layer norm of three axes": (Program((C, op("context"), LAST)), ["conv0.conv", "context1.reduce"]),
    "a convolution over positions": (Program((C, op("tokens"), op("positioned"), op("linear"))), FIRST),
    **{
        f"a kernel for every sample, {'demodulated' if demodulate else 'as it is'}": (
            Program((C, op("modulated", demodulate=demodulate), LAST)),
            ["conv0.conv", "modulated1.weight", "conv2.conv"],
        )
        for demodulate in (True, False)
    },
    "a norm without parameters": (Program((op("conv"), op("pixel_norm"), LAST)), FIRST),
    "learned tokens": (Program((C, op("tokens"), op("prompts"), op("prompts", between=True), op("linear"))), FIRST),
    **{
        f"rotary heads, {table}, {repeat}": (
            Program((C, op("tokens"), op("rotary", table=table, repeat=repeat))),
            ["conv0.conv", "rotary2.q"],
        )
        for table in ("buffer", "made", "neighbours", "complex")
        for repeat in REPEATS
    },
    "an unused module": (Program((C, op("side", form="unused"), LAST)), ["conv2.conv"]),
}
