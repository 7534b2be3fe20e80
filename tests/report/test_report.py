"""The report: its page in a real browser, its curves in TensorBoard, and itself again from JSON."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CONV, Small
from PIL import Image

from dnal_nni import Budget, DNALPruner
from dnal_nni.report.record import GroupReport, Report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def report() -> Report:
    torch.manual_seed(0)
    model, images, labels = Small(), torch.randn(8, 1, 8, 8), torch.randint(0, 10, (8,))
    pruner = DNALPruner(model, CONV, dummy_input=images, budget=Budget(flops=0.5))
    with pruner.search(250, progress=False) as search:
        for _ in range(250):
            search.step(F.cross_entropy(model(images), labels))
    pruner.speedup()
    report = pruner.report
    report.accuracy, report.latency_ms = (90.0, 89.5), (2.0, 1.0)
    report.command = "dnal compress <script>alert(1)</script>"
    report.groups.append(GroupReport("odd & <b>", 3, 3, "input", 1, "because a < b"))
    return report


def test_the_history_has_loss_and_gates(report: Report) -> None:
    assert [entry["step"] for entry in report.history] == list(range(2, 251, 2))
    assert all(sum(entry["gates"]) == 12 + 8 + 16 and len(entry["gates"]) == 20 for entry in report.history)
    assert all(0 < entry["loss"] < 10 for entry in report.history)
    assert sum(report.history[-1]["gates"][1:-1]) == 0  # decided at the end
    assert report.versions["torch"] == version("torch")


def test_it_comes_back_from_json(report: Report) -> None:
    again = Report.from_dict(json.loads(report.to_json()))
    assert again == report and str(again) == str(report) and again.to_html() == report.to_html()


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "link", "br", "rect", "path", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("rect", "path", "polyline"):
            return
        assert self.open.pop() == tag


def test_the_page_is_whole_and_asks_for_nothing(report: Report) -> None:
    page = report.to_html()
    tags = Tags()
    tags.feed(page)
    assert not tags.open and tags.seen.count("svg") == 3 and "script" not in tags.seen
    assert not re.search(r"(https?:)?//|url\(|@import|src=", page)
    assert "&lt;script&gt;" in page and "odd &amp; &lt;b&gt;" in page and "because a &lt; b" in page
    for said in ("FLOPs (M)", "target 0.5", "Left whole", f"torch {version('torch')}", "the largest difference"):
        assert said in page
    bare = Report(report.before, report.after, [])
    assert "<svg" not in bare.to_html() and "Before and after" in bare.to_html()


def photograph(page: Path, picture: Path) -> str:
    """Take a picture of a page; what the browser says meanwhile."""
    assert BROWSER is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    command = [BROWSER, *options, "--window-size=1100,1500", f"--screenshot={picture}", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stderr


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on PATH")
def test_a_browser_shows_it_without_a_complaint(report: Report, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(report.to_html())
    assert "CONSOLE" not in photograph(tmp_path / "report.html", tmp_path / "report.png")
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.size == (1100, 1500)
        colours = dict((colour, count) for count, colour in picture.convert("RGB").getcolors(1 << 24) or [])
    assert colours[(0x1F, 0x77, 0xB4)] > 2000  # curves, gates and bars are there
    (tmp_path / "broken.html").write_text("<script>console.error('seen')</script>")
    assert "CONSOLE" in photograph(tmp_path / "broken.html", tmp_path / "broken.png")  # or the test proves nothing


def test_tensorboard(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report.to_tensorboard(tmp_path)
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0})
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"search/cost", "search/delta", "search/loss"}
    last = events.Scalars("search/cost")[-1]
    assert (last.step, last.value) == (250, pytest.approx(report.history[-1]["cost"]))
    histogram = events.Histograms("search/gates")[-1].histogram_value
    assert histogram.num == 36 and sum(histogram.bucket) == 36
