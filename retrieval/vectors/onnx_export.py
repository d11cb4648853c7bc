"""Both towers to ONNX with any batch size, compared with PyTorch in onnxruntime, and with 8-bit weights."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.atomic import check_unused, new_folder
from retrieval.towers.base import Tokens, Towers
from vqvae.storage.parts import ModelError, content_hash

OPSET = 18
TOLERANCE = 1e-4
BATCHES = (1, 7)
# what the comparison reads: every language, short and long
TEXTS = [
    "红苹果",
    "a smiling face with sunglasses, noto style",
    "cœur",
    "ein schlafendes Gesicht",
    "červené srdce a modrá ryba",
    "月と星",
    "파란 물고기",
]


@dataclass(frozen=True)
class ExportedFile:
    """An ONNX file: the largest difference of a feature from PyTorch's, the mean and the least cosine with them."""

    file: str
    bytes: int
    difference: float
    cosine: float
    least_cosine: float


class ImageEncoder(nn.Module):
    """`pixels` [N, 3, H, W] -> `features` [N, D]."""

    def __init__(self, towers: Towers) -> None:
        super().__init__()
        self.towers = towers

    def forward(self, pixels: Tensor) -> Tensor:
        return self.towers.encode_pixels(pixels)


class TextEncoder(nn.Module):
    """The tensors of `tokenize`, in the order of `names` (None: a single one) -> `features` [N, D]."""

    def __init__(self, towers: Towers, names: list[str] | None) -> None:
        super().__init__()
        self.towers, self.names = towers, names

    def forward(self, *tokens: Tensor) -> Tensor:
        named: Tokens = tokens[0] if self.names is None else dict(zip(self.names, tokens, strict=True))
        return self.towers.encode_tokens(named)


def export_onnx(towers: Towers, out: Path | str, *, int8: bool = False) -> list[ExportedFile]:
    """Write `image.onnx`, `text.onnx`, `towers.json` and the text tokenizer's files to the new folder `out`.

    `image.onnx` takes what `towers.preprocess` makes, stacked; `text.onnx` what `towers.tokenize` makes; both give
    `features` [N, D] of unit length. The towers must compute in float32 on the CPU. `int8` adds `image.int8.onnx` and
    `text.int8.onnx`, quantised when they run (weights of 8 bits, activations by their range).

    Raises `ModelError` when features differ from PyTorch's by more than `TOLERANCE`, `DataError` when `out` is in use.
    """
    out = Path(out)
    check_unused(out)
    assert (towers.device.type, towers.dtype) == ("cpu", torch.float32), "compared in float32 on the CPU"
    towers.eval()
    side = towers.image_size
    pixels = torch.randn(max(BATCHES), 3, side, side, generator=torch.Generator().manual_seed(0))
    tokens = towers.tokenize(TEXTS)
    names = list(tokens) if isinstance(tokens, dict) else None
    text = dict(tokens) if isinstance(tokens, dict) else {"tokens": tokens}
    with new_folder(out) as building:
        files = []
        for name, module, inputs in (
            ("image", ImageEncoder(towers), {"pixels": pixels}),
            ("text", TextEncoder(towers, names), text),
        ):
            path = building / f"{name}.onnx"
            _export(module, inputs, path)
            exported = compare(module, inputs, path)
            if not exported.difference <= TOLERANCE:
                raise ModelError(f"the {name} tower differs by {exported.difference:.1e} in onnxruntime: not exported")
            files.append(exported)
            if int8:
                files.append(compare(module, inputs, _quantise(path)))
        for name, content in towers.text_files().items():
            (building / name).write_bytes(content)
        record = {
            "format": "mmwudao-onnx/1",
            "kind": towers.kind,
            "hash": content_hash(towers),
            "embed_dim": towers.embed_dim,
            "scale": towers.scale.item(),
            "image_size": side,
            "config": towers.to_config(),
            "files": [asdict(entry) for entry in files],
        }
        (building / "towers.json").write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return files


def compare(module: nn.Module, inputs: dict[str, Tensor], path: Path) -> ExportedFile:
    """Run an ONNX file in onnxruntime at each of `BATCHES`, against `module`."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    expected, found = [], []
    for batch in BATCHES:
        part = {name: tensor[:batch] for name, tensor in inputs.items()}
        with torch.no_grad():
            expected.append(module(*part.values()))
        found.append(torch.from_numpy(session.run(["features"], {k: v.numpy() for k, v in part.items()})[0]))
    right, ours = torch.cat(expected), torch.cat(found)
    cosines = torch.cosine_similarity(right, ours)
    return ExportedFile(
        path.name, path.stat().st_size, float((right - ours).abs().max()), float(cosines.mean()), float(cosines.min())
    )


def _export(module: nn.Module, inputs: dict[str, Tensor], path: Path) -> None:
    """The first dimension of every input is the batch; the second of a text's, its length, varies too."""
    free = torch.export.Dim.DYNAMIC
    shapes: tuple[Any, ...] = tuple({0: free, 1: free} if x.dim() == 2 else {0: free} for x in inputs.values())
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operation for a whole layer, which ONNX does not know
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's notes on its own internals
            torch.onnx.export(
                module.eval(),
                tuple(inputs.values()),
                path,
                dynamo=True,
                verbose=False,
                external_data=False,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=["features"],
                dynamic_shapes=(shapes,) if isinstance(module, TextEncoder) else shapes,
            )
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _quantise(path: Path) -> Path:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = path.with_suffix(".int8.onnx")
    model = onnx.load(path)
    del model.graph.value_info[:]  # the exporter's shapes, which do not hold for weights that are turned over
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it advises its own preprocessing through the root logger
    try:
        # onnxruntime's integer convolution has unsigned weights only
        quantize_dynamic(model, target, weight_type=QuantType.QUInt8)
    finally:
        logging.root.setLevel(level)
    return target
