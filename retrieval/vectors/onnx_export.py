"""Exports both towers to ONNX for any batch size, checks them against PyTorch, and quantises them to 8 bits."""

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
# the texts of the comparison: every language, short and long
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
    """An ONNX file: the largest difference of a feature from PyTorch's, and the mean and least cosine similarity."""

    file: str
    bytes: int
    difference: float
    cosine: float
    least_cosine: float


class OnnxImageEncoder(nn.Module):
    """`pixels` [N, 3, H, W] -> `features` [N, D]."""

    def __init__(self, towers: Towers) -> None:
        super().__init__()
        self.towers = towers

    def forward(self, pixels: Tensor) -> Tensor:
        return self.towers.encode_pixels(pixels)


class OnnxTextEncoder(nn.Module):
    """The tensors of `tokenize`, in the order of `names` (None: a single tensor) -> `features` [N, D]."""

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
    `text.int8.onnx` with dynamic quantisation (weights in 8 bits, activations by their range at run time).

    Raises `ModelError` if features differ from PyTorch's by more than `TOLERANCE`, or if PyTorch cannot export a tower
    (SigLIP 2 with pictures of any shape), `DataError` if `out` is not empty.
    """
    out = Path(out)
    check_unused(out)
    assert (towers.device.type, towers.dtype) == ("cpu", torch.float32), "compared in float32 on the CPU"
    towers.eval()
    with new_folder(out) as building:
        files = _export_both(towers, building, int8)
        for name, content in towers.text_files().items():
            (building / name).write_bytes(content)
        record = {
            "format": "mmwudao-onnx/1",
            "kind": towers.kind,
            "hash": content_hash(towers),
            "embed_dim": towers.embed_dim,
            "scale": towers.scale.item(),
            "image_size": towers.image_size,
            "config": towers.to_config(),
            "files": [asdict(entry) for entry in files],
        }
        (building / "towers.json").write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return files


def _export_both(towers: Towers, folder: Path, int8: bool) -> list[ExportedFile]:
    """Write the ONNX files of both towers, and compare each of them with PyTorch. Raises `ModelError`."""
    side = towers.image_size
    pixels = torch.randn(max(BATCHES), 3, side, side, generator=torch.Generator().manual_seed(0))
    tokens = towers.tokenize(TEXTS)
    names = list(tokens) if isinstance(tokens, dict) else None
    text = dict(tokens) if isinstance(tokens, dict) else {"tokens": tokens}
    files = []
    for name, module, inputs in (
        ("image", OnnxImageEncoder(towers), {"pixels": pixels}),
        ("text", OnnxTextEncoder(towers, names), text),
    ):
        path = folder / f"{name}.onnx"
        try:
            _export(module, inputs, path)
        except torch.onnx.OnnxExporterError as error:
            raise ModelError(f"the {name} tower cannot be exported to ONNX: PyTorch's exporter fails on it") from error
        exported = compare(module, inputs, path)
        if not exported.difference <= TOLERANCE:
            raise ModelError(f"the {name} tower differs by {exported.difference:.1e} in onnxruntime: not exported")
        files.append(exported)
        if int8:
            files.append(compare(module, inputs, _quantise(path)))
    return files


def compare(module: nn.Module, inputs: dict[str, Tensor], path: Path) -> ExportedFile:
    """Run an ONNX file in onnxruntime with each of `BATCHES`, and compare its features with those of `module`."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    expected, actual = [], []
    for batch in BATCHES:
        part = {name: tensor[:batch] for name, tensor in inputs.items()}
        with torch.no_grad():
            expected.append(module(*part.values()))
        actual.append(torch.from_numpy(session.run(["features"], {k: v.numpy() for k, v in part.items()})[0]))
    reference, features = torch.cat(expected), torch.cat(actual)
    cosines = torch.cosine_similarity(reference, features)
    difference = float((reference - features).abs().max())
    return ExportedFile(path.name, path.stat().st_size, difference, float(cosines.mean()), float(cosines.min()))


def _export(module: nn.Module, inputs: dict[str, Tensor], path: Path) -> None:
    """Export with a dynamic batch dimension of every input, and a dynamic length of tokens."""
    free = torch.export.Dim.DYNAMIC
    shapes: tuple[Any, ...] = tuple({0: free, 1: free} if x.dim() == 2 else {0: free} for x in inputs.values())
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it fuses a layer into one operator that ONNX lacks
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's remarks on its internals
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
                dynamic_shapes=(shapes,) if isinstance(module, OnnxTextEncoder) else shapes,
            )
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _quantise(path: Path) -> Path:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = path.with_suffix(".int8.onnx")
    model = onnx.load(path)
    del model.graph.value_info[:]  # the exporter's shapes do not hold for weights that get transposed
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it recommends its preprocessing through the root logger
    try:
        # onnxruntime's integer convolution supports unsigned weights only
        quantize_dynamic(model, target, weight_type=QuantType.QUInt8)
    finally:
        logging.root.setLevel(level)
    return target
