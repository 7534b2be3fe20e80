"""Mistakes on the command line; ``tests/cli_tools.py`` has the modules mynets and mydata."""

from __future__ import annotations

import contextlib
import io
import shlex
from pathlib import Path
from typing import Any

import torch

from dnal_nni import DNALError
from dnal_nni.cli.main import main

from . import Mistakes, Stage

RUN = "compress mynets:net --data mydata:loaders --out out"
INSPECT = "inspect mynets:net --input 1,3,8,8"


def typed(words: str, ahead: Any = None) -> Any:
    """A command; what it says on stderr, where it ends with 2, is what is raised."""

    def do(stage: Stage) -> None:
        if ahead is not None:
            ahead(stage)
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = main(shlex.split(words))
        if code == 2:
            raise DNALError(said.getvalue().strip().splitlines()[-1])  # behind the phases

    return do


def written(name: str, text: str) -> Any:
    return lambda stage: Path(name).write_text(text)


def folder(stage: Stage) -> None:
    for kind in ("cat", "dog"):
        Path(f"photos/{kind}").mkdir(parents=True)
        for number in range(5):
            Path(f"photos/{kind}/{number}.png").write_text("no image")


def flat(stage: Stage) -> None:
    Path("flat").mkdir()
    Path("flat/1.png").write_text("no image")


def one_class(stage: Stage) -> None:
    Path("photos/photos/cat").mkdir(parents=True)
    for number in range(5):
        Path(f"photos/photos/cat/{number}.png").write_text("no image")


def weights(state: Any) -> Any:
    return lambda stage: torch.save(state(stage.model.state_dict()), "weights.pt")


def one_image(stage: Stage) -> None:
    Path("photos/cat").mkdir(parents=True)
    Path("photos/cat/1.png").write_text("no image")


COMMANDS: Mistakes = {
    "a command that is none": (
        typed("prune mynets:net"),
        "argument COMMAND: invalid choice: 'prune' (choose from 'inspect', 'compress', 'report'",
    ),
    "an option that is none": (typed(f"{RUN} --flops 0.5 --fast"), "unrecognized arguments: --fast; see dnal --help"),
    "inspect without a network": (typed("inspect --input 1,3,8,8"), "TARGET is missing; see dnal inspect --help"),
    "inspect without an input": (typed("inspect mynets:net"), "--input is missing; see dnal inspect --help"),
    "input of letters": (
        typed("inspect mynets:net --input 1,3,x,8"),
        "--input 1,3,x,8: give whole numbers, for example 1,3,224,224",
    ),
    "input of zero": (
        typed("inspect mynets:net --input 1,0,8,8"),
        "--input 1,0,8,8: give whole numbers, for example 1,3,224,224",
    ),
    "input with x between": (
        typed("inspect mynets:net --input 1x3x8x8"),
        "--input 1x3x8x8: give whole numbers, for example 1,3,224,224",
    ),
    "input of another colour": (
        typed("inspect mynets:net --input 1,1,8,8"),
        "mynets:net rejects an input of shape (1, 1, 8, 8), float32: Given groups=1, weight of size [12, 3",
    ),
    "input that is too many": (
        typed("inspect mynets:net --input 1,3,8,8 --input 1,3,8,8"),
        "mynets:net rejects an input of shape (1, 3, 8, 8) and (1, 3, 8, 8), float32: Sequential.forward()",
    ),
    "a file for the network": (
        typed("inspect model.pt --input 1,3,8,8"),
        "'model.pt' does not name a network: write package.module:function",
    ),
    "a module that is none": (
        typed("inspect mynet:net --input 1,3,8,8"),
        "mynet cannot be imported: No module named 'mynet'",
    ),
    "a function that is none": (typed("inspect mynets:nett --input 1,3,8,8"), "mynets has no nett; did you mean net?"),
    "a module for a network": (
        typed("inspect mynets:torch --input 1,3,8,8"),
        "mynets:torch is a module, not a function that returns a network",
    ),
    "arguments that are no JSON": (
        typed(f"{INSPECT} --kwargs width=8"),
        '--kwargs width=8: give a JSON object, for example {"num_classes": 10}',
    ),
    "arguments that it lacks": (
        typed(INSPECT + " --kwargs '{\"depth\": 3}'"),
        "mynets:net(depth=3) fails: net() got an unexpected keyword argument 'depth'",
    ),
    "weights that are none": (typed(f"{INSPECT} --weights none.pt"), "there is no file none.pt"),
    "weights that are text": (
        typed(f"{INSPECT} --weights w.pt", written("w.pt", "hello")),
        "w.pt is no file of torch.save, or is damaged: give a state dict, written by",
    ),
    "weights of another network": (
        typed(f"{INSPECT} --weights w.pt", lambda s: torch.save(s.model.state_dict(), "w.pt")),
        "w.pt does not fit the model: it has no 0.weight",
    ),
    "a whole model for weights": (
        typed(f"{INSPECT} --weights w.pt", lambda s: torch.save(s.model, "w.pt")),
        "w.pt holds more than tensors, or is no file of torch.save: give a state dict, written by",
    ),
    "a graph that is none": (typed(f"{INSPECT} --graph tp"), "--graph tp: give torch-pruning, or leave it out"),
    "seconds of letters": (typed(f"{INSPECT} --verify-seconds long"), "--verify-seconds long: give a number above 0"),
    "compress without a budget": (typed(RUN), "--flops, --params or --latency is missing, for example --flops 0.5"),
    "compress without data": (
        typed("compress mynets:net --out out --flops 0.5"),
        "--data is missing; see dnal compress --help",
    ),
    "compress without a folder": (
        typed("compress mynets:net --data mydata:loaders --flops 0.5"),
        "--out is missing; see dnal compress --help",
    ),
    "flops per cent": (
        typed(f"{RUN} --flops 50"),
        "--flops 50: 50 %? write 0.5; above 1 it is the number of flops to keep, and no network",
    ),
    "flops with a sign": (
        typed(f"{RUN} --flops 50%"),
        "--flops 50%: give a number above 0: up to 1 the fraction to keep, above 1 how many",
    ),
    "flops negative": (
        typed(f"{RUN} --flops -1"),
        "--flops -1: give a number above 0: up to 1 the fraction to keep, above 1 how many",
    ),
    "flops in words": (
        typed(f"{RUN} --flops half"),
        "--flops half: give a number above 0: up to 1 the fraction to keep, above 1 how many",
    ),
    "several of two limits": (
        typed(f"{RUN} --flops 0.5 0.7 --params 0.5 0.7"),
        "--flops and --params have several numbers each: give one of them a single one",
    ),
    "no epochs of the search": (
        typed(f"{RUN} --flops 0.5 --search-epochs -1"),
        "--search-epochs -1: give a whole number of at least 0",
    ),
    "half an epoch": (typed(f"{RUN} --flops 0.5 --epochs 1.5"), "--epochs 1.5: give a whole number of at least 0"),
    "a rate of zero": (typed(f"{RUN} --flops 0.5 --lr 0"), "--lr 0: give a number above 0"),
    "a device that is none": (typed(f"{RUN} --flops 0.5 --device gpu"), "there is no device gpu on this machine"),
    "data that are none": (
        typed("compress mynets:net --data photos --out out --flops 0.5"),
        "there is no folder photos; a function is written package.module:function",
    ),
    "data of a function that is none": (
        typed("compress mynets:net --data mydata:loader --out out --flops 0.5"),
        "mydata has no loader; did you mean loaders?",
    ),
    "more workers than any machine has": (
        typed("compress mynets:net --data photos --out out --flops 0.5 --workers 999999999"),
        "--workers 999999999: give a whole number of at least 0, at most 1024",
    ),
    "a folder above the classes": (
        typed("compress mynets:net --data photos --out out --flops 0.5", one_class),
        "photos has one class only, photos: give the folder that has a folder for each class",
    ),
    "a later batch that is none": (
        typed("compress mynets:net --data mydata:torn --out out --flops 0.5"),
        "mydata:torn gives no batches (inputs, labels) of two tensors",
    ),
    "a class below 0": (
        typed("compress mynets:net --data mydata:below_zero --out out --flops 0.5"),
        "mydata:below_zero gives a class -1: classes are numbered from 0 on",
    ),
    "weights of a DataParallel": (
        typed(f"{INSPECT} --weights weights.pt", weights(lambda state: {f"module.{k}": v for k, v in state.items()})),
        "weights.pt does not fit the model: it has no ..., and the model has no module.",
    ),
    "weights with numbers for names": (
        typed(f"{INSPECT} --weights weights.pt", weights(lambda state: dict(enumerate(state.values())))),
        "weights.pt holds a dict: give a state dict",
    ),
    "an unreadable image": (
        typed("compress mynets:net --data photos --out out --flops 0.5 --input 1,3,8,8", folder),
        "photos/....png cannot be read as an image: delete it, or give --skip-unreadable",
    ),
    "a single image": (
        typed("compress mynets:net --data photos --out out --flops 0.5", one_image),
        "photos has 1 image, which is held out to test on: give more to train on",
    ),
    "labels that are no classes": (
        typed("compress mynets:net --data mydata:float_labels --out o --flops 0.5"),
        "mydata:float_labels gives labels of torch.float32 and shape [4], not one class number",
    ),
    "more classes than scores": (
        typed("compress mynets:net --data mydata:too_many_classes --out o --flops 0.5"),
        "the data have a class 6, the network only 3 scores",
    ),
    "no batch": (
        typed("compress mynets:net --data mydata:empty --out out --flops 0.5"),
        "mydata:empty: the train loader gives no batch: it has fewer examples than one batch",
    ),
    "a seed of letters": (
        typed(f"{RUN} --flops 0.5 --seed x"),
        "--seed x: give a whole number of at least 0, at most 4294967295",
    ),
    "a configuration that is none": (
        typed(f"{RUN} --config none.json"),
        "none.json cannot be read: No such file or directory",
    ),
    "a configuration that is text": (
        typed(f"{RUN} --config c.json", written("c.json", "flops: 0.5")),
        "c.json is no JSON: see its line 1",
    ),
    "a configuration with a word misspelt": (
        typed(f"{RUN} --config c.json", written("c.json", '{"flop": 0.5}')),
        "there is no option 'flop'; see dnal compress --help",
    ),
    "a configuration of a list": (
        typed(f"{RUN} --config c.json", written("c.json", "[0.5]")),
        'c.json holds no options: write for example {"flops": 0.5}',
    ),
    "an out that is a file": (typed(f"{RUN} --flops 0.5", written("out", "")), "out cannot be made: File exists"),
    "a mean of two colours": (
        typed(f"{RUN} --flops 0.5 --mean 0.5,0.5"),
        "--mean and --std: give as many numbers for one as for the other, and --std above 0",
    ),
    "dots for a colon": (
        typed("inspect torchvision.models.resnet18 --input 1,3,32,32"),
        "'torchvision.models.resnet18' does not name a network: write package.module:function; did you mean "
        "torchvision.models:resnet18?",
    ),
    "a file for the module": (
        typed("inspect ./mynets.py:net --input 1,3,8,8"),
        "./mynets.py is a file, and no module: write mynets:net, from the folder that it is in",
    ),
    "a script that reads the command line": (
        typed("inspect script:net --input 1,3,8,8", written("script.py", "import argparse, sys\nsys.exit(2)\n")),
        "script ends the program (sys.exit): move what a script does, such as reading its arguments, below if",
    ),
    "numbers for a network of words": (
        typed("inspect torch.nn:Embedding --kwargs '{\"num_embeddings\": 9, \"embedding_dim\": 4}' --input 1,6"),
        "rejects an input of shape (1, 6), float32: Expected tensor for argument #1 'indices'",
    ),
    "a mean of colours up to 255": (
        typed(f"{RUN} --flops 0.5 --mean 123,116,103 --std 58,57,57"),
        "--mean and --std: colours are numbers from 0 to 1 here: divide by 255",
    ),
    "results among the classes": (
        typed("compress mynets:net --data photos --out photos/half --flops 0.5", folder),
        "--out photos/half is among the classes of photos: choose a folder outside of it",
    ),
    "more parameters than there are": (
        typed(f"{RUN} --params 5e9"),
        "--params 5000000000 is more than the model has (2187): give less, or a fraction up to 1",
    ),
    "flops that no structure has": (
        typed(f"{RUN} --flops 0.001"),
        "--flops 0.001 cannot be reached: with one unit left in each of the 2 channel groups that may be cut, flops=",
    ),
    "data of another type": (
        typed("compress mynets:net --data mydata:double --out out --flops 0.5"),
        "the model rejects an input of mydata:double of shape (1, 3, 8, 8), float64, on cpu: Input type (double)",
    ),
    "a folder of images without classes": (
        typed("compress mynets:net --data flat --out out --flops 0.5", flat),
        "flat is no folder of images by class: Couldn't find any class folder in flat.",
    ),
    "data sets for loaders": (
        typed("compress mynets:net --data mydata:datasets --out out --flops 0.5"),
        "mydata:datasets: the train loader needs __iter__ and __len__, as a DataLoader has",
    ),
    "one loader": (
        typed("compress mynets:net --data mydata:one --out out --flops 0.5"),
        "mydata:one() returns no pair (loader to train on, loader to test on or None)",
    ),
    "report of nothing": (typed("report runs/none"), "there is no report runs/none"),
    "report of a text": (
        typed("report a.json", written("a.json", "hello")),
        "a.json is no report of dnal_nni: it is not JSON",
    ),
    "report of other JSON": (
        typed("report a.json", written("a.json", "{}")),
        "a.json: this is no report of dnal_nni: it has no 'before'",
    ),
    "report without a run": (typed("report"), "the following arguments are required: RUN; see dnal report --help"),
    "page in a folder that is none": (
        typed("report runs/none --html no/such/page.html"),
        "there is no report runs/none",
    ),
    "compare of nothing": (typed("compare"), "the following arguments are required: RUN; see dnal compare --help"),
    "compare of one that is none": (typed("compare runs/none runs/more"), "there is no report runs/none"),
}
