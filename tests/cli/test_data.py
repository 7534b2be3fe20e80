"""The data of `dnal compress`: images that cannot be read."""

import json
from pathlib import Path
from typing import Any

import pytest
from cli_tools import compress, pictures, same_networks

from dnal_nni.storage.reports import REPORT

SIZE = ["--data", "photos", "--input", "1,3,8,8", "--batch-size", "16"]
DAMAGE = {"empty": lambda data: b"", "text": lambda data: b"no image", "half": lambda data: data[: len(data) // 2]}


@pytest.fixture
def bad(work: Path) -> Path:
    pictures(work / "photos", 20)
    return work / "photos" / "red" / "7.png"


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_an_unreadable_image_is_named(damage: str, workers: str, bad: Path, capsys: Any) -> None:
    bad.write_bytes(DAMAGE[damage](bad.read_bytes()))
    assert compress(*SIZE, "--workers", workers) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "dnal: photos/red/7.png cannot be read as an image: delete it, or give --skip-unreadable"


def test_left_out_it_is_as_if_it_were_not_there(bad: Path, work: Path, capsys: Any) -> None:
    bad.write_bytes(b"no image")
    assert compress(*SIZE, "--skip-unreadable", out="skipped") == 0
    assert "left out, since unreadable: photos/red/7.png" in capsys.readouterr().out
    assert json.loads((work / "skipped" / REPORT).read_text())["notes"][0] == (
        "left out, since unreadable: photos/red/7.png"
    )
    bad.unlink()
    assert compress(*SIZE, out="gone") == 0
    assert same_networks(work / "skipped", work / "gone")


def test_many_are_counted(work: Path, capsys: Any) -> None:
    pictures(work / "photos", 20)
    for i in range(5):
        (work / "photos" / "red" / f"{i}.png").write_bytes(b"")
    assert compress(*SIZE, "--skip-unreadable") == 0
    assert "photos/red/0.png, photos/red/1.png, photos/red/2.png and 2 more" in capsys.readouterr().out


def test_a_shape_that_is_none_of_images(bad: Path, capsys: Any) -> None:
    assert compress("--data", "photos", "--input", "8,8") == 2
    assert "--input 8,8: images need four numbers, for example 1,3,224,224" in capsys.readouterr().err
