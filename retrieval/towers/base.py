"""The interface of all pairs of towers: ours, BriVL, Chinese-CLIP and OpenCLIP.

A folder of towers holds `config.json` ({"format": "mmwudao-towers/1", "kind": ...} and the settings of that kind),
`model.safetensors` and the files of its text tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from data.atomic import new_folder
from data.images import to_rgb, to_square, to_tensor
from vqvae.storage.parts import ModelError

FORMAT = "mmwudao-towers/1"
TEXT_MODEL = "text.model"  # the SentencePiece model of towers that were trained here
# kind -> module and class, which are imported when such towers are loaded
KINDS = {
    "ours": ("retrieval.towers.multiscale", "MultiScaleTowers"),
    "brivl": ("retrieval.towers.brivl", "BrivlTowers"),
    "chinese-clip": ("retrieval.towers.chinese_clip", "ChineseClipTowers"),
    "open-clip": ("retrieval.towers.open_clip", "OpenClipTowers"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Tokens = Tensor | dict[str, Tensor]


class Towers(nn.Module):
    """An image tower and a text tower with a common space of `embed_dim`. Subclasses implement what raises here."""

    kind: ClassVar[str]
    embed_dim: int
    image_size: int  # px, the side of the squares that `preprocess` makes
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @property
    def scale(self) -> Tensor:
        """The factor of similarities in training, a scalar (1 / temperature)."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, record: dict[str, Any], folder: Path) -> Self:
        """Towers with random weights from config.json (without `format` and `kind`) and the text files in `folder`."""
        raise NotImplementedError

    def to_config(self) -> dict[str, Any]:
        """The record that `from_config` reads, ready for JSON."""
        raise NotImplementedError

    def text_files(self) -> dict[str, bytes]:
        """Name -> content of the files of the text tokenizer."""
        raise NotImplementedError

    def normalise(self, pixels: Tensor) -> Tensor:
        """Standardise [..., 3, H, W] in [0, 1] for `encode_pixels`."""
        mean, std = (torch.tensor(values)[:, None, None].to(pixels) for values in (self.pixel_mean, self.pixel_std))
        return (pixels - mean) / std

    def preprocess(self, image: Image.Image) -> Tensor:
        """A picture of any mode as input of `encode_pixels`, float32 [3, H, W]."""
        return self.normalise(to_tensor(to_square(to_rgb(image), self.image_size)))

    def tokenize(self, texts: list[str]) -> Tokens:
        """Texts as input of `encode_tokens`; a text that is too long is cut, with a warning in `logging`."""
        raise NotImplementedError

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, embed_dim], float32 of unit length, differentiable."""
        raise NotImplementedError

    def encode_tokens(self, tokens: Tokens) -> Tensor:
        """Tokens of N texts -> [N, embed_dim], float32 of unit length, differentiable."""
        raise NotImplementedError

    def checkpoint_gradients(self) -> None:
        """Recompute activations in the backward pass: less memory, a third more time. `ValueError` if unsupported."""
        raise ValueError(f"towers of the kind {self.kind!r} cannot train with checkpoint_gradients")

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @torch.no_grad()
    def encode_image(self, images: Sequence[Image.Image] | Tensor, batch_size: int = 64) -> Tensor:
        """Pictures, or preprocessed pixels [N, 3, H, W] -> float32 [N, embed_dim] on the CPU, without gradients."""
        features = [torch.zeros(0, self.embed_dim)]
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            pixels = part if isinstance(part, Tensor) else torch.stack([self.preprocess(image) for image in part])
            features.append(self.encode_pixels(pixels.to(self.device, self.dtype)).cpu())
        return torch.cat(features)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Texts -> float32 [N, embed_dim] on the CPU, without gradients."""
        features = [torch.zeros(0, self.embed_dim)]
        for start in range(0, len(texts), batch_size):
            tokens = self.tokenize(list(texts[start : start + batch_size]))
            features.append(self.encode_tokens(to_device(tokens, self.device)).cpu())
        return torch.cat(features)


def unit(features: Tensor) -> Tensor:
    """Rows in float32, scaled to length 1."""
    return F.normalize(features.float(), dim=-1)


def to_device(tokens: Tokens, device: torch.device) -> Tokens:
    """The tokens on `device`."""
    if isinstance(tokens, Tensor):
        return tokens.to(device)
    return {name: tensor.to(device) for name, tensor in tokens.items()}


def load_towers(source: Path | str, device: str | torch.device = "cpu", dtype: str = "float32") -> Towers:
    """Load the towers in a folder, in eval mode and in `dtype` (see `DTYPES`), whatever dtype they are stored in.

    Raises `ModelError` if the folder is missing, incomplete, damaged, or of an unknown kind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(source)
    if dtype not in DTYPES:
        raise ModelError(f"towers run in {', '.join(DTYPES)}, not in {dtype!r}")
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ModelError(f"{folder} holds no towers: {name} is missing")
    try:
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{folder / 'config.json'} is damaged: it is not JSON") from error
    if not isinstance(record, dict) or record.pop("format", None) != FORMAT:
        raise ModelError(f'{folder / "config.json"} does not describe towers: its "format" must be {FORMAT!r}')
    kind = record.pop("kind", None)
    if kind not in KINDS:
        raise ModelError(f"{folder} holds towers of the kind {kind!r}; known kinds: {', '.join(KINDS)}")
    module, name = KINDS[kind]
    try:
        towers: Towers = getattr(import_module(module), name).from_config(record, folder)
        towers.load_state_dict(load_file(folder / "model.safetensors"))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder} is incomplete, truncated or damaged ({error})") from error
    except (KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())  # PyTorch lists each tensor that does not fit on its own line
        raise ModelError(f"{folder} does not hold towers of the kind {kind!r}: {reason[:300]}") from error
    return towers.to(device, DTYPES[dtype]).eval()


def save_towers(towers: Towers, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a folder of towers atomically, floating-point tensors in `dtype`. Returns `folder`."""
    from safetensors.torch import save_file

    tensors = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in towers.state_dict().items()
    }
    record = {"format": FORMAT, "kind": towers.kind, **towers.to_config()}
    with new_folder(folder, replace=True) as building:
        save_file(tensors, building / "model.safetensors", metadata={"format": "pt"})
        text = json.dumps(record, ensure_ascii=False, indent=1) + "\n"
        (building / "config.json").write_text(text, encoding="utf-8")
        for name, content in towers.text_files().items():
            (building / name).write_bytes(content)
        (building / "model.safetensors").chmod(0o644)  # safetensors writes private files
    return folder
