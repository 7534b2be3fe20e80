"""The page of a report: whole, without a word to the network, and shown by a real browser."""

import dataclasses
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path

import pytest
from PIL import Image

from dnal_nni.report.page import comparison
from dnal_nni.report.record import Report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
EMPTY = ("meta", "link", "br", "rect", "path", "polyline", "circle")


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in EMPTY:
            assert self.open.pop() == tag


def tags_of(page: str) -> list[str]:
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    return tags.seen


def test_the_page_is_whole_and_asks_for_nothing(report: Report) -> None:
    page = report.to_html()
    seen = tags_of(page)
    assert seen.count("svg") == 3 and "script" not in seen
    assert not re.search(r"(https?:)?//|url\(|@import|src=", page)
    assert "&lt;script&gt;" in page and "odd &amp; &lt;b&gt;" in page and "because a &lt; b" in page
    assert "fc &lt;b&gt;" in page and "Something &amp; more." in page
    for said in ("FLOPs (M)", "target 0.5", "Left whole", f"torch {version('torch')}", "largest difference"):
        assert said in page
    for said in ("after the cut", "after fine-tuning", "71.25", "FLOPs of each layer", "fft_rfft, Odd"):
        assert said in page
    bare = Report(report.before, report.after, [])
    assert "<svg" not in bare.to_html() and "Before and after" in bare.to_html()


def test_the_picture_of_the_gates_says_what_it_shows(report: Report) -> None:
    last = report.history[-1]["gates"]
    page = report.to_html()
    assert f"of the {sum(last)} gates" in re.sub(r"\s+", " ", page)
    assert f"at its end {last[0]} are closed" in page and f"{last[-1]} are open" in page  # all are decided
    assert "closed (0)" in page and "open (1)" in page


def test_a_loss_is_shown_as_it_came_and_smoothed(report: Report) -> None:
    chance = random.Random(0)
    history = [{"step": i, "loss": 2 - i / 100 + chance.random()} for i in range(100)]
    page = Report(report.before, report.after, [], history=history).to_html()
    (figure,) = re.findall(r"<figcaption>Loss.*?</figure>", page, re.S)
    raw, mean = ([float(p.split(",")[1]) for p in c.split()] for c in re.findall(r'points="([^"]+)"', figure))
    assert len(raw) == len(mean) == 100
    steps = [sum(abs(a - b) for a, b in zip(curve, curve[1:])) for curve in (raw, mean)]
    assert steps[1] < 0.3 * steps[0]
    assert min(raw) - 0.1 <= min(mean) and max(mean) <= max(raw) + 0.1


def test_layers_below_a_per_cent_are_one_row(report: Report) -> None:
    layers = {"large": (1_000_000, 500_000), **{f"small{i}": (1000, 1000 - i) for i in range(40)}}
    page = dataclasses.replace(report, layer_flops=layers).to_html()
    assert "small3" not in page and ">40 others, below 1 % each<" in page
    assert re.search(r">40 others.*?>0\.040<.*?>0\.039<", page)


def test_a_loss_that_is_no_number_is_left_out(report: Report) -> None:
    history = [entry | {"loss": float("nan") if i == 3 else entry["loss"]} for i, entry in enumerate(report.history)]
    page = Report(report.before, report.after, [], history=history).to_html()
    assert "nan" not in page


def test_a_notebook_shows_the_page_in_its_own(report: Report) -> None:
    shown = report._repr_html_()
    seen = tags_of(shown)
    assert "html" not in seen and "body" not in seen and seen.count("svg") == 3
    (style,) = re.findall(r"<style>(.*?)</style>", shown, re.S)
    rules = [rule.strip() for rule in re.findall(r"([^{}]+)\{", style)]
    assert rules and all(part.strip().startswith(".dnal") for rule in rules for part in rule.split(","))


def test_runs_side_by_side_with_a_picture_of_the_best(report: Report) -> None:
    def run(flops: int, accuracy: float) -> Report:
        after = dataclasses.replace(report.after, flops=flops)
        return dataclasses.replace(report, after=after, accuracy=(90.0, accuracy))

    names = ["large", "poor", "small", "<b>"]
    page = comparison(names, [run(900_000, 89), run(700_000, 60), run(500_000, 85), run(300_000, 50)])
    seen = tags_of(page)
    assert seen.count("svg") == 1 and seen.count("circle") == 5 and "&lt;b&gt;" in page and "<td><b>" not in page
    places = [tuple(map(float, c)) for c in re.findall(r'circle cx="([\d.]+)" cy="([\d.]+)"', page)]
    uncut, large, poor, small, least = places
    (line,) = [[tuple(map(float, p.split(","))) for p in c.split()] for c in re.findall(r'points="([^"]+)"', page)]
    assert line == [least, small, large, uncut] and poor not in line
    assert least < small < poor < large < uncut  # by FLOPs, to the right
    assert uncut[1] < large[1] < small[1] < poor[1] < least[1]  # pixels count downwards
    bare = dataclasses.replace(report, accuracy=None)
    assert "<svg" not in comparison(["a", "b"], [bare, bare])


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
