"""The ``dnal`` command: ``inspect``, ``compress``, ``report`` and ``compare``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import DNALError

if TYPE_CHECKING:
    from ..report.record import Report


_INSPECT = """\
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
_COMPRESS = """\
Your trained classifier, at half of its FLOPs, from a folder of images (train/CLASS/*.png and val/CLASS/*.png, or only
CLASS/*.png, of which every tenth is then held out to test on):

  $ dnal compress mynets:resnet --weights resnet.pt --data photos --input 1,3,64,64 --flops 0.5 --out runs/half

or with your own loading, mydata.py:

  def loaders():
      return train_loader, test_loader  # batches (inputs, labels); the second may be None

  $ dnal compress mynets:resnet --weights resnet.pt --data mydata:loaders --flops 0.5 --out runs/half

It tests the network, searches its widths while the weights go on learning, cuts it, re-estimates its norms,
fine-tunes it, and leaves in runs/half:

  slim.safetensors  the smaller network: dnal_nni.load_compressed(mynets.resnet(), "runs/half/slim.safetensors")
  report.html       what was done, to look at; report.json, for programs

After every epoch there is a checkpoint. Interrupted or killed, the same command goes on from there and ends as it would
have. Every option may stand in a file instead (JSON, or TOML from Python 3.11 on), and on the command line to overrule
it:

  $ dnal compress --config half.json --flops 0.4 --out runs/less
"""
_REPORT = """\
  $ dnal report runs/half                              the table
  $ dnal report runs/half/slim.safetensors             the same, kept beside the network
  $ dnal report runs/half --json                       everything, for programs
  $ dnal report runs/half --html half.html             a page to look at
"""
_COMPARE = """\
  $ dnal compare runs/half runs/third
"""


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape: give whole numbers, for example 1,3,224,224")
    return shape


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers, for example 0.5,0.5,0.5") from None


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

    def add(name: str, text: str, description: str, epilog: str) -> argparse.ArgumentParser:
        raw = argparse.RawDescriptionHelpFormatter
        command = commands.add_parser(name, help=text, description=description, epilog=epilog, formatter_class=raw)
        command.add_argument("--json", action="store_true", help="print JSON instead of the table")
        return command

    inspect = add(
        "inspect",
        "what of a network can be cut, and for the rest why not",
        "Show which channels of a network can be removed together, and for every layer left whole, why.",
        _INSPECT,
    )
    inspect.add_argument("target", metavar="TARGET", help="the network, as package.module:function")
    shape = "shape of the input, as 1,3,224,224"
    once = f"{shape}; once for every positional argument"
    inspect.add_argument("--input", required=True, action="append", type=_shape, metavar="SHAPE", help=once)
    inspect.add_argument("--kwargs", type=_json_object, metavar="JSON", help="keyword arguments of TARGET")
    inspect.add_argument("--weights", type=Path, metavar="FILE", help="a file of weights to load first")
    inspect.add_argument(
        "--verify-seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="time limit for comparing sliced with gated copies; groups not compared by then are left whole (60)",
    )

    compress = add(
        "compress",
        "search, cut and fine-tune a classifier",
        "Make a trained classifier smaller: learn its widths, cut it, fine-tune it.",
        _COMPRESS,
    )
    # no defaults here: what is not given is left to the config file, and then to compress.Settings
    option = functools.partial(compress.add_argument, default=argparse.SUPPRESS)
    option("model", nargs="?", metavar="TARGET", help="the network, as package.module:function")
    option("--config", type=Path, metavar="FILE", help="a file of these options: JSON, or TOML from Python 3.11 on")
    option("--data", metavar="DATA", help="a folder of images by class, or package.module:function for loaders")
    option("--out", type=Path, metavar="DIR", help="folder for the results; made if need be")
    option("--flops", type=float, metavar="F", help="FLOPs to keep: up to 1 a fraction, above 1 a number")
    option("--params", type=float, metavar="F", help="parameters to keep, likewise; of several limits, all hold")
    option("--latency", type=float, metavar="MS", help="milliseconds of one input to keep, likewise")
    option("--weights", type=Path, metavar="FILE", help="trained weights: safetensors, or a state dict of torch.save")
    option("--kwargs", type=_json_object, metavar="JSON", help="keyword arguments of TARGET")
    option("--input", type=_shape, metavar="SHAPE", help=f"{shape}: size of a folder's images (1,3,224,224)")
    option("--search-epochs", type=int, metavar="N", help="epochs of the search, in which the weights learn too (3)")
    option("--epochs", type=int, metavar="N", help="epochs of fine-tuning (10)")
    option("--lr", type=float, help="learning rate of the weights in the search (0.01)")
    option("--finetune-lr", type=float, metavar="LR", help="highest learning rate of fine-tuning (0.01)")
    option("--batch-size", type=int, metavar="N", help="of a folder's images (64)")
    option("--workers", type=int, metavar="N", help="processes that load a folder's images (0)")
    option("--mean", type=_numbers, metavar="A,B,C", help="of a folder's images, as in their training (ImageNet's)")
    option("--std", type=_numbers, metavar="A,B,C", help="likewise")
    option("--seed", type=int, metavar="N", help="of all random numbers (0)")
    option("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (auto: a GPU if there is one)")
    option("--tensorboard", action="store_true", help="write the search's curves for TensorBoard to OUT/tensorboard")

    report = add("report", "show what a compression did", "Show the report of a run.", _REPORT)
    report.add_argument("path", type=Path, metavar="RUN", help="a folder of dnal compress, a report.json or a network")
    report.add_argument("--html", type=Path, metavar="FILE", help="write a page instead")

    compare = add("compare", "two runs side by side", "Show two runs side by side.", _COMPARE)
    for name in ("a", "b"):
        compare.add_argument(name, type=Path, metavar=name.upper(), help="as for dnal report")
    return parser


# -- the commands: each returns what is printed -----------------------------------------------------------------------


def _inspect(arguments: argparse.Namespace) -> str:
    import torch

    from .inspection import inspect
    from .targets import load_target, load_weights

    model = load_target(arguments.target, arguments.kwargs)
    if arguments.weights is not None:
        model = load_weights(model, arguments.weights)
    inputs = tuple(torch.randn(shape) for shape in arguments.input)
    result = inspect(model, inputs, arguments.target, arguments.verify_seconds)
    return json.dumps(dataclasses.asdict(result), indent=2) if arguments.json else str(result)


def _compress(arguments: argparse.Namespace) -> str:
    from .run import NETWORK, PAGE, REPORT, compress
    from .settings import Settings

    given = vars(arguments)
    options = _config(given["config"]) if "config" in given else {}
    options |= {name: value for name, value in given.items() if name not in ("command", "words", "config", "json")}
    tensorboard = bool(options.pop("tensorboard", False))
    known = {field.name for field in dataclasses.fields(Settings)}
    for name in options:
        if name not in known:
            raise DNALError(f"there is no option {name!r}; see dnal compress --help")
    for name, what in (("model", "TARGET"), ("data", "--data"), ("out", "--out")):
        if name not in options:
            raise DNALError(f"{what} is missing; see dnal compress --help")
    limits = ("flops", "params", "latency")
    if any(name in given for name in limits):  # instead of all limits in the file
        options |= {name: given.get(name) for name in limits}
    settings = Settings(**options)
    report = compress(settings, shlex.join(["dnal", *arguments.words]))
    if tensorboard:
        report.to_tensorboard(settings.out / "tensorboard")
    if arguments.json:
        return report.to_json()
    return f"{report}\n\nwritten: {', '.join(str(settings.out / name) for name in (NETWORK, REPORT, PAGE))}"


def _config(path: Path) -> dict[str, Any]:
    """The options in a file, in the types that the command line gives them."""
    try:
        text = path.read_text()
        if path.suffix == ".toml":
            if sys.version_info < (3, 11):
                raise DNALError(f"{path}: TOML needs Python 3.11; write the same as JSON")
            options = importlib.import_module("tomllib").loads(text)
        else:
            options = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise DNALError(f"{path} cannot be read: {error}") from error
    if not isinstance(options, dict):
        raise DNALError(f"{path} holds no options: write for example {{\"flops\": 0.5}}")
    options = {name.replace("-", "_"): value for name, value in options.items()}
    for name in ("out", "weights"):
        if name in options:
            options[name] = Path(str(options[name]))
    for name in ("input", "mean", "std"):
        if name in options:
            if not isinstance(options[name], list) or not all(isinstance(x, (int, float)) for x in options[name]):
                raise DNALError(f"{path}: {name} is {options[name]!r}: give a list of numbers")
            options[name] = tuple(options[name])
    return options


def _report(arguments: argparse.Namespace) -> str:
    from ..storage.files import write_whole
    from .run import read_report

    report = read_report(arguments.path)
    if arguments.html is not None:
        write_whole(arguments.html, lambda path: path.write_text(report.to_html()))
        return f"written: {arguments.html}"
    return report.to_json() if arguments.json else str(report)


def _compare(arguments: argparse.Namespace) -> str:
    from .run import read_report

    paths = [arguments.a, arguments.b]
    reports = [read_report(path) for path in paths]
    if arguments.json:
        return json.dumps({str(path): report.to_dict() for path, report in zip(paths, reports)}, indent=2)
    return compared([str(path) for path in paths], reports)


def compared(names: Sequence[str], reports: Sequence[Report]) -> str:
    """A table: what two reports say after the cut, and the width of every channel group in both."""
    rows: list[tuple[str, ...]] = [("", *names)]
    cells = [{row[0]: row[2] for row in report.rows()} for report in reports]
    rows += [(what, *(cell.get(what, "-") for cell in cells)) for what in dict.fromkeys([*cells[0], *cells[1]])]
    kept = [{group.name: f"{group.kept} of {group.units}" for group in report.groups} for report in reports]
    rows += [(), ("channel group", *names)]
    rows += [(name, *(widths.get(name, "-") for widths in kept)) for name in dict.fromkeys([*kept[0], *kept[1]])]
    columns = [max(len(row[i]) for row in rows if row) for i in range(len(names) + 1)]
    return "\n".join(
        "  ".join(cell.ljust(columns[0]) if i == 0 else cell.rjust(columns[i]) for i, cell in enumerate(row))
        for row in rows
    )


_COMMANDS = {"inspect": _inspect, "compress": _compress, "report": _report, "compare": _compare}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 when all is well; 2, with one sentence on stderr, when the caller can mend it; 130 when interrupted.
    """
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        arguments = _parser().parse_args(words, argparse.Namespace(words=words))
        # what a model prints must not get into the JSON, and what libraries warn of is no news here
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            sys.path.insert(0, os.getcwd())
            result = _COMMANDS[arguments.command](arguments)
    except DNALError as error:
        print(f"dnal: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dnal: interrupted; dnal compress goes on from its last epoch with the same command", file=sys.stderr)
        return 130
    print(result)
    return 0

