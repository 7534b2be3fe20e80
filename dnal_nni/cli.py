"""The ``dnal`` command. ``dnal inspect`` shows what of a network can be cut, and for the rest why not."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import json
import os
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import DNALError

if TYPE_CHECKING:  # torch takes a second to import, `dnal --help` should not
    from torch import nn

_UNSEEN = "no run of the model on this input shows its channels"
_EXAMPLE = """\
TARGET is a function without arguments that returns the network, or the network itself, in a module that Python can
import from here. An example:

  $ dnal inspect torchvision.models:resnet18 --input 1,3,224,224

  group             channels   FLOPs  gate   layers
  conv1                   64   35.4%  norm   conv1, layer1.0.conv2, layer1.1.conv2 -> layer1.0.conv1, ...
  layer1.0.conv1          64   12.7%  norm   layer1.0.conv1 -> layer1.0.conv2
  ...
  left whole        channels  why
  fc                    1000  the model returns these channels

  12 of 13 groups can be cut; 99.7% of the FLOPs are in layers touched by one; 4.8 s

With arguments, weights, several inputs, or for a program to read:

  $ dnal inspect torchvision.models:resnet18 --kwargs '{"num_classes": 10}' --input 1,3,32,32
  $ dnal inspect mynets:unet --weights unet.safetensors --input 1,3,64,64 --input 1,10 --json
"""


# -- what is shown ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GroupRow:
    """One channel group.

    Attributes:
        channels: number of units, the length of its gate.
        flops: dense FLOPs of every layer that it touches, as a fraction of the model's (see :func:`inspect`).
        site: where its gate acts: on the affine of the norms, or at the input of the consumers.
        producers: layers whose output channels these are.
        consumers: layers that read them.
        members: everything that is cut with the group, those two included.
        frozen: why it is left whole, or None.
    """

    name: str
    channels: int
    flops: float
    site: str
    producers: list[str]
    consumers: list[str]
    members: list[str]
    frozen: str | None


@dataclasses.dataclass(frozen=True)
class WholeLayer:
    """A layer of which output channels must stay, and why.

    Attributes:
        channels: how many stay.
        width: how many it has.
    """

    name: str
    channels: int
    width: int
    why: str


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What of a network can be cut. ``touched``: fraction of the FLOPs in layers that a group to be cut touches."""

    target: str
    flops: int
    params: int
    groups: list[GroupRow]
    whole: list[WholeLayer]
    touched: float
    seconds: float

    def __str__(self) -> str:
        cut = [group for group in self.groups if group.frozen is None]
        width = max(map(len, ["left whole", *(g.name for g in cut), *(layer.name for layer in self.whole)])) + 2
        lines = []
        if cut:
            lines.append(f"{'group':{width}}{'channels':>10}{'FLOPs':>8}  {'gate':7}layers")
            for group in cut:
                layers = f"{_some(group.producers)} -> {_some(group.consumers)}"
                lines.append(
                    f"{group.name:{width}}{group.channels:>10}{group.flops:>8.1%}  {group.site:7}{layers}".rstrip()
                )
            lines.append("")
        if self.whole:
            lines.append(f"{'left whole':{width}}{'channels':>10}  why")
            for layer in self.whole:
                part = f" (of {layer.width})" if layer.channels < layer.width else ""
                lines.append(f"{layer.name:{width}}{layer.channels:>10}{part}  {layer.why}")
            lines.append("")
        lines.append(
            f"{len(cut)} of {len(self.groups)} groups can be cut; {self.touched:.1%} of the FLOPs are in layers "
            f"touched by one; {self.seconds:.1f} s"
        )
        return "\n".join(lines)


def _some(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" (+{len(names) - most})" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def inspect(model: nn.Module, dummy_input: Any, target: str = "", verify_seconds: float = 60.0) -> Inspection:
    """Find the channel groups of ``model``, verify them, and count what share of its FLOPs they touch.

    The share of a group is the dense FLOPs (fvcore's, for the dummy input) of the layers that its channels leave or
    enter, every convolution and linear layer counted whole, divided by the model's. A layer lies between two groups and
    counts for both, so that the shares add up to more than 1; ``touched`` counts every layer once.

    Args:
        model: any module; it is not changed.
        dummy_input: a tensor, or a tuple of them.
        target: what to call the model.
        verify_seconds: time limit of the verification; groups not compared by then are left whole.

    Raises:
        DNALError: where the model does not run on the input, or cannot be traced or counted.
    """
    import torch
    from torch import nn

    from .cost import flops_by_module
    from .graph import FORWARD_ERRORS, Conv, call, clone
    from .groups import find_groups
    from .verify import verify_and_freeze

    target = target or type(model).__name__
    start = time.perf_counter()
    shapes = " and ".join(str(tuple(x.shape)) for x in _as_tuple(dummy_input))
    with _told(f"{target} rejects an input of shape {shapes}", FORWARD_ERRORS), torch.no_grad():
        call(clone(model).eval(), dummy_input)
    with _told(f"the channels of {target} cannot be traced", FORWARD_ERRORS):
        groups = find_groups(model, dummy_input)
        verify_and_freeze(model, groups, dummy_input, verify_seconds)
    with _told(f"the FLOPs of {target} cannot be counted", FORWARD_ERRORS):
        flops = flops_by_module(model, dummy_input)

    def share(paths: set[str]) -> float:
        return sum(flops.get(path, 0) for path in paths) / max(flops[""], 1)

    rows = []
    touched: set[str] = set()
    seen: set[str] = set()
    stays: dict[str, Counter[str]] = defaultdict(Counter)  # layer -> reason -> output channels
    for group in groups:
        ends = {m.path for m in group.members if m.side in ("in", "out")}
        rows.append(
            GroupRow(
                name=group.name,
                channels=group.channels,
                flops=share(ends),
                site=group.site,
                producers=list(group.producers),
                consumers=list(dict.fromkeys(m.path for m in group.consumers)),
                members=list(dict.fromkeys(m.path for m in group.members)),
                frozen=group.frozen,
            )
        )
        if group.frozen is None:
            touched |= ends
        for member in group.members:
            if member.side == "out":
                seen.add(member.path)
                if group.frozen is not None:
                    stays[member.path][group.frozen] += len(member.channels)
    whole = []
    for path, module in model.named_modules():
        if isinstance(module, (Conv, nn.Linear)):
            width = int(module.out_features if isinstance(module, nn.Linear) else module.out_channels)
            reasons = stays[path] if path in seen else {_UNSEEN: width}
            whole += [WholeLayer(path, channels, width, why) for why, channels in reasons.items()]
    params = sum(p.numel() for p in model.parameters())
    return Inspection(target, flops[""], params, rows, whole, share(touched), time.perf_counter() - start)


def _as_tuple(dummy_input: Any) -> tuple[Any, ...]:
    return tuple(dummy_input) if isinstance(dummy_input, (list, tuple)) else (dummy_input,)


@contextlib.contextmanager
def _told(what: str, errors: type[Exception] | tuple[type[Exception], ...] = Exception) -> Iterator[None]:
    """What somebody else's code raises, as one sentence; importing and building run code that may raise anything."""
    try:
        yield
    except DNALError:
        raise
    except errors as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DNALError(f"{what}: {lines[0]}") from error


# -- the arguments ----------------------------------------------------------------------------------------------------


def load_target(target: str, kwargs: dict[str, Any] | None = None) -> nn.Module:
    """The network that ``package.module:callable`` returns, or is."""
    from torch import nn

    name, colon, attribute = target.partition(":")
    if not (name and colon and attribute):
        raise DNALError(f"{target!r} does not name a network: write package.module:function")
    with _told(f"{name} cannot be imported"):
        found: Any = importlib.import_module(name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise DNALError(f"{name} has no {attribute}{_guess(part, dir(found))}")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        if kwargs:
            raise DNALError(f"{target} is a network already: leave --kwargs out")
        return found
    if not callable(found):
        raise DNALError(f"{target} is a {type(found).__name__}, not a function that returns a network")
    call = f"{target}({', '.join(f'{key}={value!r}' for key, value in (kwargs or {}).items())})"
    with _told(f"{call} fails"):
        model = found(**(kwargs or {}))
    if not isinstance(model, nn.Module):
        raise DNALError(f"{call} returns a {type(model).__name__}, not a torch.nn.Module")
    return model


def _guess(wrong: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(wrong, names, 1)
    return f"; did you mean {close[0]}?" if close else ""


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """The model with the state dict in a safetensors file, or as ``save_compressed`` wrote it."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    from .checkpoint import FORMAT, load_compressed

    if not path.is_file():
        raise DNALError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            compressed = (file.metadata() or {}).get("format") == FORMAT
        if compressed:
            return load_compressed(model, path)
        missing, unexpected = model.load_state_dict(load_file(path), strict=False)
    except (OSError, SafetensorError) as error:
        raise DNALError(f"{path} cannot be read: {error}") from error
    except RuntimeError as error:  # of load_state_dict: a line for every tensor of another shape
        raise DNALError(f"{path} does not fit the model: {str(error).splitlines()[-1].strip()}") from error
    if missing or unexpected:
        what = f"it has no {missing[0]}" if missing else f"the model has no {unexpected[0]}"
        raise DNALError(f"{path} does not fit the model: {what}")
    return model


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape: give whole numbers, for example 1,3,224,224")
    return shape


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object: write for example {{"num_classes": 10}}')
    return value


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DNALError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dnal", description="Make a trained CNN smaller by learning its widths.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser(
        "inspect",
        help="what of a network can be cut, and for the rest why not",
        description="Show which channels of a network can be removed together, and for every layer left whole, why.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("target", metavar="TARGET", help="the network, as package.module:function")
    command.add_argument(
        "--input",
        required=True,
        action="append",
        type=_shape,
        metavar="SHAPE",
        help="shape of the input, as 1,3,224,224; once for every positional argument",
    )
    command.add_argument("--kwargs", type=_json_object, metavar="JSON", help="keyword arguments of TARGET")
    command.add_argument("--weights", type=Path, metavar="FILE", help="a safetensors file to load first")
    command.add_argument("--json", action="store_true", help="print JSON instead of the table")
    command.add_argument(
        "--verify-seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="time limit for comparing sliced with gated copies; groups not compared by then are left whole (60)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when all is well, 2 and one sentence on stderr when the caller can mend it."""
    try:
        arguments = _parser().parse_args(argv)
        # what a model prints must not get into the JSON, and what libraries warn of is no news here
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            import torch

            sys.path.insert(0, os.getcwd())
            model = load_target(arguments.target, arguments.kwargs)
            if arguments.weights is not None:
                model = load_weights(model, arguments.weights)
            inputs = tuple(torch.randn(shape) for shape in arguments.input)
            result = inspect(model, inputs, arguments.target, arguments.verify_seconds)
    except DNALError as error:
        print(f"dnal: {error}", file=sys.stderr)
        return 2
    print(json.dumps(dataclasses.asdict(result), indent=2) if arguments.json else result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
