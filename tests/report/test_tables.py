"""Text tables: any number of reports side by side."""

import dataclasses
import re
from pathlib import Path

import pytest

from dnal_nni.report.tables import compared, table
from dnal_nni.storage.reports import read_report

DATA = Path(__file__).with_name("data")


def test_numbers_stand_under_their_heads() -> None:
    lines = table(["name", "n"], [["a long name", "1"], ["b", "1000"]]).splitlines()
    assert [line.rindex(end) + len(end) for line, end in zip(lines, ("n", "1", "1000"))] == [len(lines[2])] * 3
    assert table(["name", "n"], []).split() == ["name", "n"]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_runs(count: int) -> None:
    files = ["report-0.1.json", "speedup-0.1.json"]
    names = [f"run{i}" for i in range(count)]
    lines = compared(names, [read_report(DATA / files[i % 2]) for i in range(count)]).splitlines()
    head = names if count > 1 else ["uncut", *names]  # they are of two networks
    assert lines[0].split() == head and lines[lines.index("") + 1].split() == ["channel", "group", *head]
    rows = {re.split(r"\s{2,}", line)[0]: line.split() for line in lines}
    uncut = [] if count > 1 else ["0.051"]
    assert rows["FLOPs (M)"][2:] == uncut + ["0.025", "0.021"] * (count // 2) + ["0.025"] * (count % 2)
    assert rows["0"][1:].count("6") == (count + 1) // 2 and rows["0"].count("-") == count // 2


def test_runs_of_one_network_stand_beside_it() -> None:
    first = read_report(DATA / "report-0.1.json")
    lines = compared(["a", "b"], [first, dataclasses.replace(first, after=first.before)]).splitlines()
    assert lines[0].split() == ["uncut", "a", "b"]
    assert lines[1].split()[2:] == ["0.051", "0.025", "0.051"] and lines[-3].split() == ["0", "12", "6", "6"]
