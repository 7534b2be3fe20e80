"""The house is as the plan says: floors, files one reads in a sitting, classes that do one thing."""

import ast
import configparser
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "dnal_nni").rglob("*.py"))
TOO_LONG, TOO_MUCH = 400, 300  # lines of a file, of a class


def test_no_import_runs_upward() -> None:
    """The contracts of .importlinter: the floors, and where NNI and torch-pruning may be imported."""
    done = subprocess.run([Path(sys.executable).parent / "lint-imports"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_folder_is_a_floor() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / ".importlinter")
    floors = config["importlinter:contract:floors"]["layers"].replace("|", "\n").split()
    here = {path.stem for path in (ROOT / "dnal_nni").iterdir() if path.is_dir() or path.suffix == ".py"}
    assert set(floors) == here - {"__init__", "__main__", "__pycache__", "py"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_and_classes_are_read_in_a_sitting(file: Path) -> None:
    text = file.read_text()
    assert text.count("\n") <= TOO_LONG
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            assert (node.end_lineno or 0) - node.lineno < TOO_MUCH, node.name
