"""Cut the quickstart's network to half of its FLOPs, then quantize it to int8: after training, and in training.

    python examples/quantize.py --out out/quantize

Needs torchao, onnx, onnxscript and onnxruntime (pip install torchao onnx onnxscript onnxruntime). Three minutes on one
CPU core; nothing is downloaded. Prints accuracy and file size of the dense and the cut network, in float, quantized
after training (by ONNX Runtime, and by torchao) and in training (torchao); leaves ONNX files and table.json in OUT.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import torch.nn.functional as F
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from quickstart import accuracy, batches, digits, network, train
from torch import Tensor, nn
from torchao.quantization.pt2e import move_exported_model_to_eval, move_exported_model_to_train
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

from dnal_nni import Budget, DNALPruner

DYNAMIC = ({0: torch.export.Dim.DYNAMIC},)  # any batch


def int8_after_training(model: nn.Module, images: Iterable[Tensor], x: Tensor) -> nn.Module:
    """torchao's post-training quantization; ``torch.compile`` what it returns, with inductor's freezing on."""
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    exported = torch.export.export(copy.deepcopy(model).eval(), (x,), dynamic_shapes=DYNAMIC).module()
    observed = prepare_pt2e(exported, quantizer)
    for batch in images:  # where the observers see what numbers there are
        observed(batch)
    quantized: nn.Module = convert_pt2e(observed)
    return quantized


def int8_in_training(model: nn.Module, x: Tensor, tune: Callable[[nn.Module], Any]) -> nn.Module:
    """torchao's quantization-aware training: ``tune(model)`` is your training loop, one to three epochs of it."""
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(is_qat=True))
    exported = torch.export.export(copy.deepcopy(model).train(), (x,), dynamic_shapes=DYNAMIC).module()
    rounding = prepare_qat_pt2e(exported, quantizer)  # in float, but for the rounding
    move_exported_model_to_train(rounding)
    tune(rounding)
    move_exported_model_to_eval(rounding)
    quantized: nn.Module = convert_pt2e(rounding)
    return quantized


def to_onnx(model: nn.Module, x: Tensor, path: Path) -> None:
    """As an ONNX file, for a batch like ``x``; a quantized model too: what it stores in 8 bits stays so."""
    torch.onnx.export(model, (x,), str(path), dynamo=True, verbose=False, external_data=False)


class Images(CalibrationDataReader):  # type: ignore[misc]
    """What ONNX Runtime asks for numbers."""

    def __init__(self, name: str, images: Iterable[Tensor]) -> None:
        self.batches = iter([{name: batch.numpy()} for batch in images])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.batches, None)


def int8_by_onnx_runtime(path: Path, to: Path, images: Iterable[Tensor]) -> None:
    """Post-training quantization of a float ONNX file; ``images`` are batches of the size that it was exported for."""
    folded = to.with_suffix(".folded.onnx")
    quant_pre_process(str(path), str(folded))  # norms into convolutions
    (entry,) = onnxruntime.InferenceSession(str(folded)).get_inputs()
    quantize_static(
        str(folded), str(to), Images(entry.name, images), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    folded.unlink()


def onnx_accuracy(path: Path, images: Tensor, labels: Tensor) -> float:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return 100 * float((torch.from_numpy(found).argmax(1) == labels).double().mean())


def gentle(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
    """The training loop of the quantization-aware training: a small, constant learning rate."""
    optimizer = torch.optim.SGD(model.parameters(), 0.002, momentum=0.9)
    for images, labels in data:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20, help="of training, of the search and of fine-tuning, each")
    parser.add_argument("--out", type=Path, default=Path("out/quantize"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")  # of the exporters
    torch.manual_seed(0)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    train_x, test_x, train_y, test_y = digits()

    model = network()
    train(model, batches(train_x, train_y, args.epochs, 0), 0.1, "train")
    dense = copy.deepcopy(model)
    train(dense, batches(train_x, train_y, 2 * args.epochs, 1), 0.02, "train on")  # as many epochs as the cut one

    pruner = DNALPruner(model, [{"op_types": ["Conv2d"]}], dummy_input=train_x[:1], budget=Budget(flops=0.5))
    data = batches(train_x, train_y, args.epochs, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=5e-4)
    model.train()
    with pruner.search(len(data), optimizer=optimizer) as search:
        for images, labels in data:
            search.step(F.cross_entropy(model(images), labels))
    slim = pruner.speedup()
    train(slim, batches(train_x, train_y, args.epochs, 2), 0.02, "fine-tune")

    calibration = [images for images, _ in batches(train_x, train_y, 1, 3)]
    few = batches(train_x, train_y, 3, 4)
    every = torch.cat(calibration)[: len(test_x)]  # as large as the batch that is tested: the files have a fixed size
    rows = []
    print(f"{'network':8}{'numbers':30}{'accuracy (%)':>14}{'ONNX file (kB)':>16}")
    for name, net in (("dense", dense), ("cut", slim)):
        x = train_x[:2]
        kinds = {
            "float": net,
            "int8, torchao": int8_after_training(net, calibration, x),
            "int8, torchao, in training": int8_in_training(net, x, lambda rounding: gentle(rounding, few)),
        }
        files = {kind: args.out / f"{name}-{number}.onnx" for number, kind in enumerate(kinds)}
        for kind, quantized in kinds.items():
            to_onnx(quantized.eval() if kind == "float" else quantized, test_x, files[kind])
        files["int8, ONNX Runtime"] = args.out / f"{name}-{len(kinds)}.onnx"
        int8_by_onnx_runtime(files["float"], files["int8, ONNX Runtime"], [every])
        for kind, path in files.items():
            right = onnx_accuracy(path, test_x, test_y)
            rows.append({"network": name, "numbers": kind, "accuracy": right, "bytes": path.stat().st_size})
            print(f"{name:8}{kind:30}{right:14.2f}{path.stat().st_size / 1e3:16.1f}")
    result = {"command": shlex.join(["python", *sys.argv]), "versions": pruner.report.versions, "rows": rows}
    (args.out / "table.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"accuracy of the cut network in PyTorch: {accuracy(slim, test_x, test_y):.2f} %; files: {args.out}")


if __name__ == "__main__":
    main()
