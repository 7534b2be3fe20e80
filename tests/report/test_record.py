"""The report as data: from a search, to JSON, and back; from older versions and damaged files."""

import json
import random
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from dnal_nni import DNALError
from dnal_nni.report.record import GroupReport, Report
from dnal_nni.storage.reports import read_report

DATA = Path(__file__).with_name("data")


def test_the_history_has_loss_and_gates(report: Report) -> None:
    assert [entry["step"] for entry in report.history] == list(range(2, 251, 2))
    assert all(sum(entry["gates"]) == 12 + 8 + 16 and len(entry["gates"]) == 20 for entry in report.history)
    assert all(0 < entry["loss"] < 10 for entry in report.history)
    assert sum(report.history[-1]["gates"][1:-1]) == 0  # decided at the end
    assert report.versions["torch"] == version("torch")


def test_it_comes_back_from_json(report: Report) -> None:
    again = Report.from_dict(json.loads(report.to_json()))
    assert again == report and str(again) == str(report) and again.to_html() == report.to_html()


def test_what_is_kept_and_what_has_changed_are_columns(report: Report) -> None:
    rows = {name: cells for name, *cells in report.rows()}
    assert rows["latency (ms)"] == ["2.00", "1.00", "50.0%", "-50.0%"]
    assert rows["file (MB)"] == ["0.015", "0.008", "50.7%", "-49.3%"]
    assert rows["accuracy, not tuned (%)"] == ["90.00", "71.25", "", "-18.75"]
    assert rows["accuracy (%)"] == ["90.00", "89.50", "", "-0.50"]
    kept = report.after.flops / report.before.flops
    assert rows["FLOPs (M)"][2:] == [f"{kept:.1%}", f"{kept - 1:+.1%}"]
    head, *lines = str(report).splitlines()
    assert head.split() == ["before", "after", "kept", "change"]
    assert "not in the FLOPs, since fvcore cannot count it: fft_rfft, Odd" in lines
    assert "Something & more." in lines


def test_repr_is_one_line(report: Report) -> None:
    assert "\n" not in repr(report) and len(repr(report)) < 300
    assert "FLOPs (M) 1.195 -> 0.59" in repr(report) and "of 5 channel groups cut" in repr(report)


@pytest.mark.parametrize("name", ["accuracy", "latency_ms", "file_bytes"])
@pytest.mark.parametrize("value", [98.0, (1.0,), (1.0, None), "ab", [True, False]])
def test_pairs_are_checked_where_they_are_set(report: Report, name: str, value: Any) -> None:
    before = getattr(report, name)
    with pytest.raises(DNALError, match=rf"report\.{name} is .*: give two numbers, \(before, after\)"):
        setattr(report, name, value)
    assert getattr(report, name) == before


# -- of version 0.1 -------------------------------------------------------------------------------------------------


def test_reports_of_version_0_1_still_load() -> None:
    report = read_report(DATA / "report-0.1.json")
    assert report.before.flops == 50736 and report.after.params == 1083 and report.targets == {"flops": 0.5}
    assert report.accuracy == (100 / 3, 100.0) and report.accuracy_cut is None and not report.layer_flops
    assert report.groups[0] == GroupReport("0", 12, 6, "norm", 3, None) and len(report.history) == 8
    assert report.settings["search_epochs"] == 2 and "49.0%" in str(report) and "<svg" in report.to_html()
    assert read_report(DATA / "slim-0.1.safetensors") == report
    of_masks = read_report(DATA / "speedup-0.1.json")
    assert of_masks.groups[0].asked == {"a": 3, "b": 3} and "a 3, b 3" in of_masks.to_html()
    assert "of masked and cut network, relative: 7.4e-01" in str(of_masks)


def test_the_old_format_is_part_of_the_new() -> None:
    """Programs that read the JSON of version 0.1 find all that they know."""
    old = json.loads((DATA / "report-0.1.json").read_text())
    new = json.loads(Report.from_dict(old).to_json())
    for name in ("before", "after"):
        assert new[name].pop("uncounted") == []
    assert {name: new[name] for name in old} == old


# -- damaged --------------------------------------------------------------------------------------------------------


def test_any_value_changed_to_anything_is_a_report_or_a_sentence(report: Report) -> None:
    chance = random.Random(0)
    text = report.to_json()
    others: list[Any] = [None, True, -1, 0, 1e400, "x", [], {}, [1], [1, 2], {"a": 1}, [[1]], {"a": [1, 2]}]
    for _ in range(1000):
        values = json.loads(text)
        place: Any = values
        while True:
            key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not (isinstance(place[key], (dict, list)) and place[key]) or chance.random() < 0.3:
                break
            place = place[key]
        place[key] = chance.choice(others)
        try:
            again = Report.from_dict(values)
        except DNALError:
            continue
        assert str(again) and again.to_html()
