"""Text tables: any number of reports side by side."""

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
    assert lines[0].split() == names and lines[lines.index("") + 1].split() == ["channel", "group", *names]
    rows = {re.split(r"\s{2,}", line)[0]: line for line in lines}
    flops = rows["FLOPs (M)"].split()[2:]
    assert flops == ["0.025", "0.021"] * (count // 2) + ["0.025"] * (count % 2)
    assert rows["0"].split()[1:4] == ["6", "of", "12"] and rows["0"].split().count("-") == count // 2
