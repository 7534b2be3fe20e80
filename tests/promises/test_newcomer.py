"""What somebody new meets: a wheel, a new venv, and the commands of the README. Minutes: pytest -m slow.

The dependencies are those of the environment that runs the tests (`.ci/run` makes one); the package is the wheel's.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
pytestmark = pytest.mark.slow


def run(command: list[str], folder: Path, **variables: str) -> str:
    """What a command prints; its errors are part of the failure."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OMP"))}
    done = subprocess.run(
        command, cwd=folder, env=environment | {"MPLBACKEND": "agg"} | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "dnal_nni", source / "dnal_nni", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(out), "."]
    run(pip, source)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def newcomer(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The Python of a venv that has the wheel, and a folder with the examples, as in a clone."""
    home = tmp_path_factory.mktemp("newcomer")
    venv.create(home / "venv", with_pip=True)
    python = home / "venv" / "bin" / "python"
    where = ["-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    here, there = (Path(run([str(p), *where], home).strip()) for p in (sys.executable, python))
    (there / "dependencies.pth").write_text(f"{here}\n")
    run([str(python), "-m", "pip", "install", "-q", "--no-deps", str(wheel)], home)
    shutil.copytree(ROOT / "examples", home / "examples")
    found = run([str(python), "-c", "import dnal_nni; print(dnal_nni.__file__)"], home)
    assert found.startswith(str(home))
    return python, home


def test_the_quickstart(newcomer: tuple[Path, Path]) -> None:
    python, home = newcomer
    assert 'pip install -e ".[examples]" && python examples/quickstart.py' in README
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    printed = run([str(python), "examples/quickstart.py"], home)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime <= 60  # seconds of CPU
    result = json.loads((home / "out" / "report.json").read_text())
    assert result["after"]["flops"] / result["before"]["flops"] == pytest.approx(0.5, rel=0.01)
    assert result["after"]["accuracy"] >= result["before"]["accuracy"] - 1
    for name in ("slim.safetensors", "report.html", "report.json", "widths.png"):
        assert f"out/{name}" in printed and (home / "out" / name).stat().st_size > 100
    assert re.search(r"latency is that of a batch of 450", printed)
    again = """
        import sys; sys.path.insert(0, "examples")
        from quickstart import accuracy, digits, network
        from dnal_nni import load_compressed
        _, images, _, labels = digits()
        print(accuracy(load_compressed(network(), "out/slim.safetensors"), images, labels))
    """
    script = "\n".join(line.strip() for line in again.splitlines())
    assert float(run([str(python), "-c", script], home)) == pytest.approx(result["after"]["accuracy"], abs=0.01)


def test_every_block_of_the_readme(newcomer: tuple[Path, Path]) -> None:
    python, home = newcomer
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.S | re.M)
    assert len(blocks) >= 3
    for block in blocks:
        run([str(python), "-W", "ignore", "-c", block], home)


def test_the_commands(newcomer: tuple[Path, Path]) -> None:
    python, home = newcomer
    path = f"{python.parent}:{os.environ['PATH']}"
    commands = re.findall(r"^dnal [^\n]*$", README, re.M)
    assert commands
    for command in commands:
        run(["sh", "-c", command], home, PATH=path)
    version = run([str(python), "-c", "import dnal_nni; print(dnal_nni.__version__)"], home).strip()
    assert run(["sh", "-c", "dnal --version"], home, PATH=path).strip() == f"dnal_nni {version}"


def test_what_the_wheel_says(wheel: Path, newcomer: tuple[Path, Path]) -> None:
    """Version, what it needs, and that it brings what is read at run time."""
    python, home = newcomer
    names = run([str(python), "-m", "zipfile", "-l", str(wheel)], home)
    assert "dnal_nni/py.typed" in names and "dnal_nni/report/templates/page.html" in names
    assert "tests/" not in names and "benchmarks/" not in names
    show = "print(found['Version'], found.get_all('Requires-Dist'))"
    script = f"from importlib.metadata import metadata; found = metadata('dnal_nni'); {show}"
    said = run([str(python), "-c", script], home).replace(" ==", "==").replace(" >=", ">=")
    assert said.split()[0] in wheel.name and "nni==3.0" in said and "torch>=2.2" in said
