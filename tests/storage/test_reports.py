"""Reports in files: damaged ones, and others that are none."""

from pathlib import Path

import pytest

from dnal_nni import DNALError
from dnal_nni.storage.reports import read_report

DATA = Path(__file__).parents[1] / "report" / "data"


def test_what_is_no_report_is_said_in_a_sentence(tmp_path: Path) -> None:
    network = (DATA / "slim-0.1.safetensors").read_bytes()
    without_report = (DATA.parents[1] / "storage" / "data" / "network-0.1.safetensors").read_bytes()
    for name, data, said in (
        ("none.json", None, "there is no report"),
        ("text.json", b"\xff\xfe", "is no report of dnal_nni: it is not JSON"),
        ("deep.json", b"[" * 100_000, "is no report of dnal_nni: it is not JSON"),
        ("list.json", b"[]", "is no report of dnal_nni"),
        ("empty.json", b"{}", "this is no report of dnal_nni: it has no 'before'"),
        ("empty.safetensors", b"", "is no safetensors file, or is damaged"),
        ("short.safetensors", network[:100], "is no safetensors file, or is damaged"),
        ("long.safetensors", b"\xff" * 8 + network[8:], "is no safetensors file, or is damaged"),
        ("other.safetensors", network.replace(b'"dnal_nni/1"', b'"something1"'), "was not written by save_compressed"),
        ("plain.safetensors", without_report, "holds no report"),
        ("changed.safetensors", network.replace(b"50736", b"50737"), "is damaged: its bytes do not have"),
    ):
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(DNALError, match=said) as error:
            read_report(path)
        assert name in str(error.value) and "\n" not in str(error.value)
