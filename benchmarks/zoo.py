"""The models of `zoo_models.py` one by one: is the sliced network the gated one, how much goes, how long does it take.

    python benchmarks/zoo.py                           # what benchmarks/results/zoo.jsonl lacks for this commit
    python benchmarks/zoo.py --only resnet18,timm_dla34 --again
    python benchmarks/zoo.py --graph torch-pruning     # the same with its graph: benchmarks/results/zoo_graph.jsonl
    python benchmarks/zoo.py --table                   # these, and what zoo_criteria.py found, -> docs/models.md

Every model runs in a process of its own, with one thread and limits on wall-clock time and memory: random weights,
norms and scales moved away from their initial values, groups found and verified, then a random 30 % cut that the
verification did not try. Gated and sliced network are compared in float64, in eval and in train mode, by code of
`zoo_one.py` and not of the package. One JSON line a model.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from provenance import commit
from zoo_models import MODELS, Entry
from zoo_one import VERIFY_SECONDS, Record, plain, run_model
from zoo_table import summary, write_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "zoo.jsonl"
GRAPH_RESULTS = RESULTS.with_name("zoo_graph.jsonl")
BUDGET_RESULTS = RESULTS.with_name("budgets.jsonl")  # of budgets.py
CRITERIA_RESULTS = RESULTS.with_name("zoo_criteria.jsonl")  # of zoo_criteria.py
TABLE = ROOT / "docs" / "models.md"

WALL_SECONDS = 150.0
MEMORY_BYTES = 14 * 2**30


def run_isolated(
    entry: Entry,
    seconds: float = VERIFY_SECONDS,
    wall: float = WALL_SECONDS,
    options: Sequence[str] = (),
    script: str = __file__,
) -> Record:
    """`run_model` in a process of its own, with one thread, stopped after ``wall`` seconds.

    Args:
        entry: which model.
        seconds: as for `run_model`.
        wall: limit of the process.
        options: further ones of the command line.
        script: what is run in place of this file.
    """
    command = [sys.executable, str(Path(script).resolve()), "--worker", entry.name, "--seconds", str(seconds), *options]
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # the package of this checkout, installed or not
    limits = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": os.pathsep.join(path)}
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.PIPE, text=True, env=os.environ | limits, cwd=ROOT
        )
        try:
            _, errors = process.communicate(timeout=wall)
            status = "crash"
        except subprocess.TimeoutExpired:
            process.kill()
            _, errors = process.communicate()
            status = "timeout"
        out.seek(0)
        lines = [line for line in out.read().splitlines() if line.startswith("{")]
    record: Record = json.loads(lines[-1]) if lines else {"model": entry.name, "task": entry.task, "phase": "start"}
    if record.get("status", "unfinished") == "unfinished":  # killed: by us, by the kernel, or by a fault in C++
        record["status"] = status
        if status == "crash":
            last = next(reversed(errors.strip().splitlines()), "")
            record["error"] = plain(f"exit status {process.returncode} {last}")
    record["wall_seconds"] = round(time.monotonic() - started, 1)
    return record | provenance(seconds)


def provenance(seconds: float) -> Record:
    """Commit of the package (not of the results: those would change it), versions, and the time limit."""
    packages = ("torch", "torchvision", "timm", "torch-pruning", "fvcore")
    return {
        "verify_seconds": seconds,
        "commit": commit(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def load(path: Path) -> dict[str, Record]:
    """The last record of every model in a results file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {record["model"]: record for record in map(json.loads, lines)}


def save(path: Path, records: Mapping[str, Record]) -> None:
    """Write one line a model, in the order of the list, so that two runs can be compared line by line."""
    order = {name: i for i, name in enumerate(MODELS)}
    ordered = sorted(records.values(), key=lambda record: order.get(record["model"], len(order)))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in ordered))
    temporary.replace(path)


def run_many(
    entries: Iterable[Entry], path: Path, run: Callable[[Entry], Record], jobs: int, again: bool
) -> dict[str, Record]:
    """Run what ``path`` lacks for this commit and write after every model: it can be stopped and resumed."""
    records, now = load(path), commit()
    todo = [e for e in entries if again or records.get(e.name, {}).get("commit") != now]
    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    try:
        futures = [pool.submit(run, entry) for entry in todo]
        for number, future in enumerate(concurrent.futures.as_completed(futures), 1):
            record = future.result()
            records[record["model"]] = record
            save(path, records)
            print(f"{number}/{len(todo)} {one_line(record)}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt ends the run, not one model
    return records


def one_line(record: Record) -> str:
    groups = record.get("groups", {})
    return (
        f"{record['model']:34s} {record['status']:10s} {groups.get('gated', '-')}/{groups.get('all', '-')} groups, "
        f"FLOPs left {record.get('flops', {}).get('left', '-')}, {record.get('seconds', {}).get('total', '-')} s "
        f"{record.get('error', '')}{'' if record['phase'] == 'done' else ' in ' + record['phase']}"
    )


def worker(run: Callable[[Callable[[Record], None]], Record]) -> None:
    """Run one model in this process: a line for every phase, as far as it is."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    print(json.dumps(run(lambda record: print(json.dumps(record), flush=True))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names, separated by commas")
    parser.add_argument("--again", action="store_true", help="also what is there for this commit")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=VERIFY_SECONDS, help="limit of each verification")
    parser.add_argument("--wall", type=float, default=WALL_SECONDS, help="limit of each model")
    parser.add_argument("--graph", choices=["torch-pruning"], help="where the groups come from; default: our own graph")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", action="store_true", help="write docs/models.md and run nothing")
    parser.add_argument("--worker", metavar="NAME", help="one model in this process (used by the script itself)")
    args = parser.parse_args()
    names = [name for name in args.only.split(",") if name] or list(MODELS)
    if unknown := [name for name in [*names, *([args.worker] if args.worker else [])] if name not in MODELS]:
        parser.error(f"not in zoo_models.py: {', '.join(unknown)}")
    if args.worker:
        worker(lambda report: run_model(MODELS[args.worker], args.seconds, report, args.graph))
    elif args.table:
        ways = load(GRAPH_RESULTS), load(CRITERIA_RESULTS)
        write_table(load(args.out or RESULTS), *ways, TABLE, load(BUDGET_RESULTS))
    else:
        options = ["--graph", args.graph] if args.graph else []
        out = args.out or (GRAPH_RESULTS if args.graph else RESULTS)
        run = functools.partial(run_isolated, seconds=args.seconds, wall=args.wall, options=options)
        records = run_many((MODELS[name] for name in names), out, run, args.jobs, args.again)
        print(summary([records[name] for name in MODELS if name in records]))


if __name__ == "__main__":
    main()
