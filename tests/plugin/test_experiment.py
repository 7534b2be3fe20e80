"""examples/nnictl: two real trials under NNI's own server, from Python and from nnictl, and nothing is left behind."""

import contextlib
import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from nnictl.pareto import Point, front, read
from quickstart import network

from dnal_nni import measure

EXAMPLE = Path(__file__).parents[2] / "examples" / "nnictl"


class Sandbox:
    """A home of its own for what NNI writes, by which its processes are known too, and a free port."""

    def __init__(self, root: Path) -> None:
        self.home, self.temporary = root / "home", root / "temporary"
        for folder in (self.home, self.temporary):
            folder.mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        own = {"HOME": self.home, "TMPDIR": self.temporary, "NNI_CONFIG_DIR": self.home / "config"}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # python and nnictl
        self.environment = {**os.environ, **{name: str(folder) for name, folder in own.items()}, "PATH": path}
        self.environment |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
        self.outside = self._outside()

    @staticmethod
    def _outside() -> list[Path]:
        """The files where NNI would write by default, and those beside the example."""
        places = (Path.home() / "nni-experiments", Path.home() / ".config" / "nni", Path(sys.prefix) / "nni", EXAMPLE)
        return sorted(path for place in places for path in place.rglob("*"))

    def processes(self) -> list[psutil.Process]:
        """All processes that run in this home, whoever their parent is by now."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("HOME") == str(self.home):
                    found.append(process)
        return found

    def commands(self) -> str:
        """The command lines of all of them."""
        lines = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                lines.append(" ".join(process.cmdline()))
        return "\n".join(lines)

    def addresses(self) -> set[str]:
        """The addresses that processes of this home listen on, at the port."""
        found = set()
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                for c in process.net_connections("inet"):
                    if c.status == psutil.CONN_LISTEN and c.laddr.port == self.port:
                        found.add(c.laddr.ip)
        return found

    def wait(self, condition: Callable[[], object], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s"
            time.sleep(0.2)

    def run(self, *command: object) -> str:
        """Output of a command that must succeed."""
        done = subprocess.run(
            [str(part) for part in command], env=self.environment, capture_output=True, text=True, timeout=150
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextlib.contextmanager
    def experiment(self, *arguments: object) -> Iterator[subprocess.Popen[str]]:
        """experiment.py under way."""
        command = [sys.executable, EXAMPLE / "experiment.py", "--port", self.port, *arguments]
        with subprocess.Popen(
            [str(part) for part in command], env=self.environment, stdout=-1, stderr=subprocess.STDOUT, text=True
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def check_trials(self, results: list[dict]) -> None:
        """Two trials that hit their budgets, in the result and in NNI's own database."""
        dense = measure(network(), torch.zeros(1, 1, 8, 8)).flops
        assert len(results) == 2
        for result in results:
            assert result["default"] > 85
            assert result["flops"] == pytest.approx(result["budget"] * dense, rel=0.01)
        database = self.home / "nni-experiments" / "_latest" / "db" / "nni.sqlite"
        with contextlib.closing(sqlite3.connect(database)) as db:
            ends = db.execute("select event from TrialJobEvent where event not in ('WAITING', 'RUNNING')").fetchall()
            metrics = dict(db.execute("select type, count(*) from MetricData group by type"))
        assert ends == [("SUCCEEDED",)] * 2
        assert metrics == {"PERIODICAL": 8, "FINAL": 2}

    def check_nothing_left(self) -> None:
        assert self.processes() == []
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", self.port)) != 0
        assert list(self.temporary.iterdir()) == []
        assert self._outside() == self.outside

    def kill(self) -> None:
        """For a test that failed midway."""
        left = self.processes()
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=10)


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Sandbox]:
    sandbox = Sandbox(tmp_path)
    try:
        yield sandbox
    finally:
        sandbox.kill()


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_from_python(sandbox: Sandbox, tmp_path: Path) -> None:
    with sandbox.experiment("--max-trials", 2, "--out", tmp_path / "out") as process:
        sandbox.wait(sandbox.addresses)
        assert sandbox.addresses() == {"127.0.0.1"}
        output, _ = process.communicate(timeout=150)
    assert process.returncode == 0, output
    assert "MFLOPs" in output
    sandbox.check_trials(read(tmp_path / "out" / "trials.json"))
    assert is_png(tmp_path / "out" / "pareto.png")
    sandbox.check_nothing_left()


@pytest.mark.parametrize("moment", ["main.js", "trial.py"], ids=["starting", "training"])
def test_terminated(sandbox: Sandbox, tmp_path: Path, moment: str) -> None:
    with sandbox.experiment("--out", tmp_path / "out") as process:
        sandbox.wait(lambda: moment in sandbox.commands())
        process.terminate()
        output, _ = process.communicate(timeout=60)
    assert "terminated" in output
    assert process.returncode == 1
    sandbox.check_nothing_left()


def test_from_nnictl(sandbox: Sandbox, tmp_path: Path) -> None:
    config = yaml.safe_load((EXAMPLE / "config.yml").read_text())
    config |= {"maxTrialNumber": 2, "trialCodeDirectory": str(EXAMPLE)}
    config["searchSpaceFile"] = str(EXAMPLE / config["searchSpaceFile"])
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    sandbox.environment["NODE_OPTIONS"] = f'--require "{EXAMPLE / "loopback.js"}"'

    def done() -> bool:
        with urlopen(f"http://127.0.0.1:{sandbox.port}/api/v1/nni/check-status", timeout=10) as answer:
            return json.load(answer)["status"] == "DONE"

    sandbox.run("nnictl", "create", "--config", tmp_path / "config.yml", "--port", sandbox.port)
    assert sandbox.addresses() == {"127.0.0.1"}
    sandbox.wait(done, 150)
    sandbox.run("nnictl", "experiment", "export", "--type", "json", "--filename", tmp_path / "trials.json")
    sandbox.run("nnictl", "stop")
    sandbox.run(sys.executable, EXAMPLE / "pareto.py", tmp_path / "trials.json", tmp_path / "pareto.png")
    sandbox.check_trials(read(tmp_path / "trials.json"))
    assert is_png(tmp_path / "pareto.png")
    sandbox.check_nothing_left()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5))))
def test_front(points: list[Point]) -> None:
    def beaten(p: Point) -> bool:
        return any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)

    assert front(points) == sorted({p for p in points if not beaten(p)})


@pytest.mark.parametrize("name", ["remote", "kubernetes"])
def test_nni_takes_the_configurations_for_other_machines(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are `config.yml` on another training service."""
    from nni.experiment.config import ExperimentConfig

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "id_ed25519").touch()  # NNI looks for the key
    found = ExperimentConfig.load(EXAMPLE / f"{name}.yml").json()
    local = ExperimentConfig.load(EXAMPLE / "config.yml").json()
    for key in ("searchSpace", "trialConcurrency", "maxTrialNumber", "trialCodeDirectory"):
        assert found[key] == local[key]
    service = found["trainingService"]
    assert service["platform"] == {"remote": "remote", "kubernetes": "frameworkcontroller"}[name]
    assert local["trialCommand"] in (found.get("trialCommand"), service.get("taskRoles", [{}])[0].get("command"))
