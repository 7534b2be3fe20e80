"""The experiment of config.yml from Python: run it, stop NNI's server, draw accuracy against FLOPs.

    python examples/nnictl/experiment.py --out out/nnictl

Writes OUT/trials.json (NNI's export) and OUT/pareto.png. The 20 trials take some three minutes on two CPU cores. The
server is reachable from this machine only; while it runs, http://localhost:8080 shows the trials.
"""

import argparse
import json
import os
import shlex
import signal
import sys
from pathlib import Path

import psutil
from nni.experiment import Experiment
from nni.experiment.config import ExperimentConfig
from pareto import read, show

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/nnictl"))
    parser.add_argument("--max-trials", type=int, help="instead of config.yml's")
    parser.add_argument("--concurrency", type=int, help="trials at a time; above 1 see docs/experiments.md")
    parser.add_argument("--port", type=int, default=8080)
    args = parser.parse_args()

    config = ExperimentConfig.load(HERE / "config.yml")
    config.trial_command = f"{shlex.quote(sys.executable)} trial.py"
    config.max_trial_number = args.max_trials or config.max_trial_number
    config.trial_concurrency = args.concurrency or config.trial_concurrency
    # NNI's server would listen on every interface
    os.environ["NODE_OPTIONS"] = f'--require "{HERE / "loopback.js"}"'
    # by default the end of this process, and the server would stay
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))

    experiment = Experiment(config)
    try:
        if not experiment.run(args.port):
            sys.exit("the experiment was interrupted or failed; NNI's log says why")
        results = experiment.export_data()
        failed = [job for job in experiment.list_trial_jobs() if job.status != "SUCCEEDED"]
    finally:
        experiment.stop()
        for process in psutil.Process().children():  # interrupted while the server started: stop() knows none
            process.terminate()
            process.wait(60)

    args.out.mkdir(parents=True, exist_ok=True)
    exported = [{"parameter": r.parameter, "value": json.dumps(r.value), "trialJobId": r.trialJobId} for r in results]
    (args.out / "trials.json").write_text(json.dumps(exported, indent=2) + "\n")
    if results:
        show(read(args.out / "trials.json"), args.out / "pareto.png")
    if failed:
        folders = [Path(job.stderrPath).parent for job in failed]  # NNI 3.0 has the file's name wrong
        sys.exit("\n".join(f"{job.status}: see {folder / 'trial.stderr'}" for job, folder in zip(failed, folders)))


if __name__ == "__main__":
    main()
