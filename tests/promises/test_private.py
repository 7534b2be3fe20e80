"""No file reads another object's private state: whatever is needed outside of its class has a public name.

Names of other libraries are theirs: torch's ``_modules``, what NNI's base classes ask a pruner to override.
"""

import ast
import importlib
import inspect
import pkgutil
import re
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

import dnal_nni

ROOT = Path(__file__).parents[2]
FOLDERS = ("dnal_nni", "tests", "benchmarks", "examples", "docs")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("_")


def defined(tree: ast.AST) -> Iterator[str]:
    """Functions, classes, attributes and module variables that a file makes."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def inherited() -> set[str]:
    """What the base classes of our classes have, which are other libraries'."""
    names = set(dir(torch.nn.Module()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NNI wraps every class of torch.nn when it is imported
        modules = [info.name for info in pkgutil.walk_packages(dnal_nni.__path__, "dnal_nni.")]
        for name in modules:
            if name == "dnal_nni.__main__" or ".strategies" in name and find_spec("pytorch_lightning") is None:
                continue
            for _, thing in inspect.getmembers(importlib.import_module(name), inspect.isclass):
                names |= {n for base in thing.__mro__ if not base.__module__.startswith("dnal_nni") for n in vars(base)}
    return names


def root_of(node: ast.expr) -> str:
    """The name that a chain of attributes starts with."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def uses(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line, private name and code of whatever reads another object's."""
    tree = ast.parse(path.read_text())
    foreign = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            foreign |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            if not node.level and node.module is not None and not node.module.startswith("dnal_nni"):
                foreign |= {alias.asname or alias.name for alias in node.names}
                continue
            for alias in node.names:
                if private(alias.name):
                    yield node.lineno, alias.name, ast.unparse(node)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            # not of torch's and NNI's modules: nn.modules.instancenorm._InstanceNorm
            if root_of(node.value) not in {"self", "cls"} | foreign:
                yield node.lineno, node.attr, ast.unparse(node)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if found := re.fullmatch(r"dnal_nni(?:\.\w+)*\.(_[a-z]\w*)", node.value):  # monkeypatch.setattr
                yield node.lineno, found[1], node.value


def test_no_file_reads_another_object_s_private_state() -> None:
    trees = [ast.parse(path.read_text()) for path in FILES if path.is_relative_to(ROOT / "dnal_nni")]
    ours = {name for tree in trees for name in defined(tree) if private(name)} - inherited()
    assert {"_calibrated", "_resume"} <= ours and not {"_apply", "_fuse_preprocess", "_modules"} & ours
    found = [
        f"{path.relative_to(ROOT)}:{line}: {code}" for path in FILES for line, name, code in uses(path) if name in ours
    ]
    assert not found, "\n".join(found)
