"""What only reads a report, or shows help, is there at once: no torch, no NNI."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

DATA = Path(__file__).parents[1] / "report" / "data"
HEAVY = {"torch", "torchvision", "nni", "fvcore", "scipy", "matplotlib", "safetensors", "tqdm"}
COMMANDS = {
    "no command": [],
    "help": ["--help"],
    "help of compress": ["compress", "--help"],
    "help of inspect": ["inspect", "--help"],
    "version": ["--version"],
    "report": ["report", str(DATA / "report-0.1.json")],
    "report of a network": ["report", str(DATA / "slim-0.1.safetensors")],
    "report as JSON": ["report", str(DATA / "report-0.1.json"), "--json"],
    "report as a page": ["report", str(DATA / "report-0.1.json"), "--html", os.devnull],
    "compare": ["compare", str(DATA / "report-0.1.json"), str(DATA / "speedup-0.1.json")],
    "a mistake": ["compress", "mynets:net", "--data", "x", "--out", "y", "--flops", "half"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_heavy_import(name: str, tmp_path: Path) -> None:
    words = [str(tmp_path / "page.html") if word == os.devnull else word for word in COMMANDS[name]]
    code = (
        "import sys; from dnal_nni.cli import main\n"
        f"try: rc = main({words!r})\n"
        "except SystemExit as exit: rc = exit.code\n"
        f"heavy = {HEAVY!r} & set(sys.modules); assert not heavy, heavy\n"
        f"assert rc == {2 if name == 'a mistake' else 0}"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and (done.stdout or name == "a mistake"), done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_a_small_network_is_inspected_without_what_it_does_not_need(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def net(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))\n"
    )
    code = (
        "import sys; from dnal_nni.cli import main\n"
        "assert main(['inspect', 'mine:net', '--input', '1,3,8,8']) == 0\n"
        "heavy = {'torchvision', 'torch._dynamo', 'nni', 'matplotlib', 'sympy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "can be cut" in done.stdout, done.stderr


def test_the_first_pruner_costs_little_beside_what_torch_and_nni_do() -> None:
    """In seconds of CPU, without Lightning and transformers, which NNI imports where they are installed.

    All of it is below 3 on a machine at rest, more than 2 of which are torch's and NNI's own.
    """
    code = (
        "import sys, time\n"
        "sys.modules.update(pytorch_lightning=None, transformers=None)\n"
        "import torch, nni, nni.compression\n"
        "start = time.process_time()\n"
        "from dnal_nni import Budget, DNALPruner\n"
        "nn = torch.nn\n"
        "net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))\n"
        "x = torch.randn(1, 3, 8, 8)\n"
        "DNALPruner(net, [{'op_types': ['Conv2d']}], dummy_input=x, budget=Budget(flops=0.5))\n"
        "print(time.process_time() - start)\n"
        "heavy = {'torchvision', 'torch._dynamo', 'matplotlib', 'sympy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.2
