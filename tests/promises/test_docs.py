"""The documentation is what the code says."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.filterwarnings("ignore")  # NNI looks at every class of torch.nn
def test_the_api_page_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs"), *sys.path])
    import make_api

    text = make_api.page()
    assert (ROOT / "docs" / "api.md").read_text() == text, "run: python docs/make_api.py"
    for name in ("DNALPruner.search", "load_compressed", "Report.to_html", "register_adapter"):
        assert f" {name}\n" in text


def anchors(page: Path) -> set[str]:
    """What links to the headings of a page end in."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        if not target.startswith("https://"):
            there = page.parent / target if target else page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), f"{target}#{anchor}"


def test_every_file_of_the_package_is_in_the_table() -> None:
    rows = re.findall(r"^\| ?(?:`(\w+)/`)? \| ([^|]+) \|", (ROOT / "README.md").read_text(), re.M)
    names = [(floor, name) for floor, cell in rows for name in re.findall(r"`([^`]+)`", cell)]
    shown = {Path(floor) / name.removesuffix("/").removesuffix(".py") for floor, name in names}
    package = ROOT / "dnal_nni"
    for file in package.rglob("*.py"):
        place = file.relative_to(package).with_suffix("")
        inside_of_one = any(Path(*place.parts[:n]) in shown for n in (1, 2, 3))
        assert inside_of_one or place.name in ("__init__", "__main__", "moved"), place


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text()], ids=lambda page: page.name)
def test_every_block_runs_by_itself(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of Python, each alone, and commands of `dnal`, in the order of the page."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    found = re.findall(r"^```python\n(.*?)^```|^(dnal [^\n]*)$", page.read_text(), re.S | re.M)
    assert found
    for block, command in found:
        if block:
            exec(compile(block, str(page), "exec"), {"__name__": "__main__"})
        else:
            subprocess.run(command, shell=True, check=True, cwd=ROOT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_excerpts_are_what_the_examples_say(page: Path) -> None:
    """Blocks marked "py" need packages that the tests do without: lines of an example, which has its own test."""
    examples = [path.read_text() for path in (ROOT / "examples").rglob("*.py")]
    for block in re.findall(r"^```py\n(.*?)^```", page.read_text(), re.S | re.M):
        block = textwrap.dedent(block)
        assert any(textwrap.indent(block, " " * n) in text for text in examples for n in (0, 4, 8, 12)), block


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_nothing_is_installed_from_where_it_is_not(page: Path) -> None:
    """The package is not on PyPI."""
    assert not re.search(r"pip install [^\n`]*dnal.?nni", page.read_text())
