"""The ``dnal`` command: ``inspect``, ``compress``, ``report`` and ``compare``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from ..errors import DNALError, told
from ..progress import logger
from ..report.record import Report
from ..report.tables import compared
from ..storage.reports import REPORT, read_report
from ..storage.whole import write_whole
from .settings import LIMITS, Inspecting, Settings

COMPARISON = "compared.html"

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

Of several numbers there is a run for each, in runs/0.7, runs/0.5 and runs/0.35, and a page of all, runs/compared.html:

  $ dnal compress --config half.json --flops 0.7 0.5 0.35 --out runs
"""
_REPORT = """\
  $ dnal report runs/half                              the table
  $ dnal report runs/half/slim.safetensors             the same, kept beside the network
  $ dnal report runs/half --json                       everything, for programs
  $ dnal report runs/half --html half.html             a page to look at
"""
_COMPARE = """\
  $ dnal compare runs/half runs/third runs/quarter
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DNALError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dnal", description="Make a trained CNN smaller by learning its widths.")
    parser.add_argument("--version", action="version", version=f"dnal_nni {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

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
    Inspecting.add_to(inspect)

    compress = add(
        "compress",
        "search, cut and fine-tune a classifier",
        "Make a trained classifier smaller: learn its widths, cut it, fine-tune it.",
        _COMPRESS,
    )
    file = "a file of these options: JSON, or TOML from Python 3.11 on"
    compress.add_argument("--config", type=Path, metavar="FILE", help=file)
    Settings.add_to(compress)

    report = add("report", "show what a compression did", "Show the report of a run.", _REPORT)
    report.add_argument("path", type=Path, metavar="RUN", help="a folder of dnal compress, a report.json or a network")
    report.add_argument("--html", type=Path, metavar="FILE", help="write a page instead")

    compare = add("compare", "runs side by side", "Show any number of runs side by side.", _COMPARE)
    compare.add_argument("paths", nargs="+", type=Path, metavar="RUN", help="as for dnal report")
    compare.add_argument("--html", type=Path, metavar="FILE", help="write a page instead, with accuracy by FLOPs")
    return parser


# -- the commands: each returns what is printed -----------------------------------------------------------------------


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of a command that are fields of its settings."""
    others = ("command", "words", "config", "json")
    return {name: value for name, value in vars(arguments).items() if name not in others}


def _inspect(arguments: argparse.Namespace) -> str:
    options = Inspecting.of(_given(arguments), "inspect")
    import torch

    from .inspection import inspect
    from .targets import load_target, load_weights

    model = load_target(options.model, options.kwargs)
    if options.weights is not None:
        model = load_weights(model, options.weights)
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    inputs = tuple(torch.randn(shape).to(dtypes[0] if dtypes else torch.float32) for shape in options.input)
    result = inspect(model, inputs, options.model, options.verify_seconds, options.graph)
    return json.dumps(result.to_dict(), indent=2) if arguments.json else str(result)


def _compress(arguments: argparse.Namespace) -> str:
    given = _given(arguments)
    for name in LIMITS:  # a TARGET behind --flops 0.5 looks to argparse like another number
        if "model" not in given and len(given.get(name, ())) > 1 and ":" in given[name][-1]:
            given["model"] = given[name].pop()
    options = _config(arguments.config) if arguments.config is not None else {}
    if any(name in given for name in LIMITS):  # instead of all limits in the file
        options = {name: value for name, value in options.items() if name not in LIMITS}
    runs = _runs(options | given)
    from tqdm.contrib.logging import logging_redirect_tqdm

    from .run import NETWORK, ONNX, PAGE, compress

    logger.setLevel(logging.INFO)
    with logging_redirect_tqdm([logger]):  # to stderr, above the bars
        reports = [compress(settings, shlex.join(["dnal", *arguments.words])) for settings in runs]
    if len(runs) == 1:
        files = [runs[0].out / name for name in (NETWORK, REPORT, PAGE, ONNX)]
        written = [path for path in files if path.exists()]
        shown = reports[0].to_json() if arguments.json else str(reports[0])
    else:
        names, page = [settings.out.name for settings in runs], runs[0].out.parent / COMPARISON
        _write_comparison(page, names, reports)
        written = [*(settings.out for settings in runs), page]
        shown = _as_json(names, reports) if arguments.json else compared(names, reports)
    return shown if arguments.json else f"{shown}\n\nwritten: {', '.join(map(str, written))}"


def _runs(options: dict[str, Any]) -> list[Settings]:
    """What is to be done: a run, or for several numbers of one limit, a run each in a folder of its name."""
    lists = {name: options[name] for name in LIMITS if isinstance(options.get(name), list)}
    settings = Settings.of(options | {name: next(iter(values), "") for name, values in lists.items()}, "compress")
    several = [name for name, values in lists.items() if len(values) > 1]
    if not several:
        return [settings]
    if len(several) > 1:
        raise DNALError(f"--{several[0]} and --{several[1]} have several numbers each: give one of them a single one")
    values = dict.fromkeys(lists[several[0]])
    return [dataclasses.replace(settings, **{several[0]: v, "out": settings.out / str(v)}) for v in values]


def _write_comparison(path: Path, names: Sequence[str], reports: Sequence[Report]) -> None:
    from ..report.page import comparison

    write_whole(path, lambda temporary: temporary.write_text(comparison(names, reports)))


def _as_json(names: Sequence[str], reports: Sequence[Report]) -> str:
    return json.dumps({name: report.to_dict() for name, report in zip(names, reports)}, indent=2)


def _config(path: Path) -> dict[str, Any]:
    """The options in a file."""
    if path.suffix == ".toml" and sys.version_info < (3, 11):
        raise DNALError(f"{path}: TOML needs Python 3.11; write the same as JSON")
    kind = "TOML" if path.suffix == ".toml" else "JSON"
    with told(f"{path} cannot be read", (OSError, UnicodeError)):
        text = path.read_text()
    try:
        options = importlib.import_module("tomllib" if kind == "TOML" else "json").loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        raise DNALError(f"{path} is no {kind}{f': see its line {line}' if line else ''}") from error
    if not isinstance(options, dict):
        raise DNALError(f'{path} holds no options: write for example {{"flops": 0.5}}')
    return {name.replace("-", "_"): value for name, value in options.items()}


def _report(arguments: argparse.Namespace) -> str:
    report = read_report(arguments.path)
    if arguments.html is not None:
        write_whole(arguments.html, lambda path: path.write_text(report.to_html()))
        return f"written: {arguments.html}"
    return report.to_json() if arguments.json else str(report)


def _compare(arguments: argparse.Namespace) -> str:
    names, reports = [str(path) for path in arguments.paths], [read_report(path) for path in arguments.paths]
    if arguments.html is not None:
        _write_comparison(arguments.html, names, reports)
        return f"written: {arguments.html}"
    return _as_json(names, reports) if arguments.json else compared(names, reports)


_COMMANDS = {"inspect": _inspect, "compress": _compress, "report": _report, "compare": _compare}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 when all is well; 2, with one sentence on stderr, when the caller can mend it; 130 when interrupted; 141 when
        whoever read what it prints has gone.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        print(_run(words), flush=True)
        return 0
    except DNALError as error:
        print(f"dnal: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "; the same command goes on from its last epoch" if words[:1] == ["compress"] else ""
        print(f"dnal: interrupted{again}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its end
        return 141


def _run(words: list[str]) -> str:
    """What a command prints."""
    parser = _parser()
    arguments = parser.parse_args(words, argparse.Namespace(words=words))
    if arguments.command is None:
        return parser.format_help().rstrip()
    # what a model prints must not get into the JSON, and what libraries warn of is no news here
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        sys.path.insert(0, os.getcwd())
        return _COMMANDS[arguments.command](arguments)
