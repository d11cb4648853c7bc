"""The interface of all pairs of towers: ours, BriVL, Chinese-CLIP, OpenCLIP and those of transformers.

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
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F

from data.atomic import new_folder
from data.images import to_rgb, to_squares
from data.records import parse_json
from vqvae.storage.parts import ModelError, disk_errors

FORMAT = "mmwudao-towers/1"
TEXT_MODEL = "text.model"  # the SentencePiece model of towers that were trained here
# kind -> module and class, which are imported when such towers are loaded
KINDS = {
    "ours": ("retrieval.towers.multiscale", "MultiScaleTowers"),
    "pretrained": ("retrieval.towers.pretrained", "PretrainedTowers"),
    "brivl": ("retrieval.towers.brivl", "BrivlTowers"),
    "chinese-clip": ("retrieval.towers.chinese_clip", "ChineseClipTowers"),
    "open-clip": ("retrieval.towers.open_clip", "OpenClipTowers"),
    "transformers": ("retrieval.towers.hub_towers", "TransformersTowers"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

MAX_STRETCH = 64  # how many times longer than wide a picture may be: more is cropped at both ends
RESIZED_TOGETHER = 2**16  # pixels of a picture: larger ones fill the memory before they are many

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
        """Towers from config.json (without `format` and `kind`) and the text files in `folder`.

        Their weights are random, or all `without_weights`.
        """
        raise NotImplementedError

    def to_config(self) -> dict[str, Any]:
        """The record that `from_config` reads, ready for JSON."""
        raise NotImplementedError

    def text_files(self) -> dict[str, bytes]:
        """Name -> content of the files of the text tokenizer."""
        raise NotImplementedError

    def stored_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of `model.safetensors`, floating ones in `dtype`, on the CPU."""
        return {
            name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
            for name, tensor in self.state_dict().items()
        }

    def restored_tensors(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of what `stored_tensors` gave. Raises `ValueError` for tensors that do not fit."""
        return stored

    def normalise(self, pixels: Tensor) -> Tensor:
        """Standardise [..., 3, H, W] in [0, 1] for `encode_pixels`."""
        mean, std = (torch.tensor(values)[:, None, None].to(pixels) for values in (self.pixel_mean, self.pixel_std))
        return (pixels - mean) / std

    def preprocess(self, image: Image.Image) -> Tensor:
        """A picture of any mode as input of `encode_pixels`, float32 [3, H, W]."""
        return self._standardised(to_squares([to_rgb(image)], self.image_size))[0]

    def lighten(self, image: Image.Image) -> Image.Image | Tensor:
        """What `stack` takes for a picture of any mode: a small one as it is, a large one as few bytes."""
        if self._own_way:
            return self.preprocess(image)
        image = to_rgb(image)
        return image if image.width * image.height <= RESIZED_TOGETHER else to_squares([image], self.image_size)[0]

    def stack(self, pictures: Sequence[Image.Image | Tensor]) -> Tensor:
        """`preprocess` of several pictures that `lighten` returned, on the towers' device: float32 [N, 3, H, W]."""
        tensors = [picture for picture in pictures if isinstance(picture, Tensor)]
        if self._own_way:
            return torch.stack(tensors).to(self.device)
        small = iter(to_squares([p for p in pictures if isinstance(p, Image.Image)], self.image_size))
        squares = [picture if isinstance(picture, Tensor) else next(small) for picture in pictures]
        return self._standardised(torch.stack(squares))

    @property
    def _own_way(self) -> bool:
        """Whether these towers take something else than squares."""
        return type(self).preprocess is not Towers.preprocess

    def _standardised(self, squares: Tensor) -> Tensor:
        """`normalise` of bytes [N, S, S, 3] as float32 [N, 3, S, S], with the channels of a pixel side by side."""
        # a row of pixels at a time: three channels alone leave most of a vector unit idle
        mean, std = (torch.tensor(values).repeat(self.image_size) for values in (self.pixel_mean, self.pixel_std))
        scale, offset = (value.to(self.device) for value in (1 / (255 * std), -mean / std))
        rows = torch.addcmul(offset, squares.to(self.device).flatten(2).float(), scale)
        return rows.unflatten(2, (self.image_size, 3)).permute(0, 3, 1, 2)

    def tokenize(self, texts: list[str]) -> Tokens:
        """Texts as input of `encode_tokens`; a text that is too long is cut, with a warning in `logging`."""
        raise NotImplementedError

    def count_tokens(self, tokens: Tokens) -> list[int]:
        """How many tokens of each text `tokens` holds, those that mark its ends included and padding left out."""
        return token_counts(tokens if isinstance(tokens, Tensor) else tokens["ids"], pad=0)

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
            pixels = part if isinstance(part, Tensor) else self.stack([self.lighten(image) for image in part])
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


def shortened(image: Image.Image) -> Image.Image:
    """A picture without the ends of a strip, for resizing that enlarges the shorter side before it crops.

    Of a strip, that would be a picture that no memory holds.
    """
    longest = MAX_STRETCH * min(image.size)
    if max(image.size) <= longest:
        return image
    return ImageOps.fit(image, (min(image.width, longest), min(image.height, longest)))


def token_counts(ids: Tensor, pad: int) -> list[int]:
    """The length of each row of ids [N, L] without the padding behind it."""
    places = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    counts: list[int] = ((ids != pad) * places).amax(dim=1).tolist()  # `pad` may also be a token within a text
    return counts


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
        record = parse_json((folder / "config.json").read_bytes())
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
        # weights that `from_config` left without storage become the stored tensors themselves
        empty = any(parameter.is_meta for parameter in towers.parameters())
        stored = towers.restored_tensors(load_file(folder / "model.safetensors"))
        towers.load_state_dict(stored, assign=empty)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder} is incomplete, truncated or damaged ({error})") from error
    except ModelError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())  # PyTorch lists each tensor that does not fit on its own line
        raise ModelError(f"{folder} does not hold towers of the kind {kind!r}: {reason[:300]}") from error
    return towers.to(device, DTYPES[dtype]).eval()


def save_towers(towers: Towers, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a folder of towers atomically, floating-point tensors in `dtype`. Returns `folder`."""
    from safetensors.torch import save_file

    record = {"format": FORMAT, "kind": towers.kind, **towers.to_config()}
    with new_folder(folder, replace=True) as building:
        with disk_errors():
            save_file(towers.stored_tensors(dtype), building / "model.safetensors", metadata={"format": "pt"})
        text = json.dumps(record, ensure_ascii=False, indent=1) + "\n"
        (building / "config.json").write_text(text, encoding="utf-8")
        for name, content in towers.text_files().items():
            (building / name).write_bytes(content)
        (building / "model.safetensors").chmod(0o644)  # safetensors writes private files
    return folder
