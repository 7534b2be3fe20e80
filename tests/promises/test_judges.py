"""The judges of searches: their spaces are those that were measured, and a search that was stopped goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytorch_lightning")
from torchvision.transforms.functional import to_pil_image

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# what NAS-Bench-Macro's table says of these networks: multiply-adds and parameters
MACRO = {
    "00000000": (7_713_280, 387_882), "11111111": (53_246_464, 1_588_874), "22222222": (105_660_928, 2_932_586),
    "02012100": (47_327_744, 890_666), "01200210": (39_596_544, 1_179_882),
}  # fmt: skip


@pytest.mark.parametrize("name", MACRO)
def test_networks_of_nas_bench_macro_are_what_the_table_says(name: str) -> None:
    nas_macro = pytest.importorskip("nas_macro")
    model = nas_macro.network(name)
    flops, params = MACRO[name]
    assert sum(p.numel() for p in model.parameters()) == params
    # fvcore counts norms too
    assert nas_macro.measure(model, nas_macro.IMAGE).flops == pytest.approx(flops, rel=0.03)


@pytest.mark.slow
def test_the_macro_judge_goes_on_where_it_stopped(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for label in range(10):
        folder = tmp_path / "train" / str(label)
        folder.mkdir(parents=True)
        for i in range(8):
            to_pil_image(torch.rand(3, 32, 32, generator=generator)).save(folder / f"{i}.png")
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / "nas_macro.py"), "search", "--root", str(tmp_path)]
    command += ["--out", str(tmp_path), "--images", "64", "--epochs", "2", "--batch", "4", "--seeds", "0"]
    subprocess.run([*command, "--methods", "prime"], check=True, capture_output=True)
    subprocess.run([*command, "--methods", "prime", "random_oneshot"], check=True, capture_output=True)
    runs = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [run["job"]["method"] for run in runs] == ["prime", "random_oneshot"]
    assert all(len(run["name"]) == 8 and set(run["name"]) <= set("012") for run in runs)
