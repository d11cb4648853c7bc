"""Models of open_clip behind our interface, built from a local configuration without any download."""

from __future__ import annotations

import copy
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from open_clip import (
    CLIP,
    CoCa,
    CustomTextCLIP,
    SimpleTokenizer,
    add_model_config,
    get_model_config,
    list_models,
)
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn

from data.characters import whole_characters
from data.config import ConfigError
from data.text import TextTokenizer
from retrieval.towers.base import TEXT_MODEL, Tokens, Towers, shortened, token_counts, unit
from retrieval.towers.foreign import check_open_clip
from retrieval.towers.hub_settings import TOKENIZER_FILES
from retrieval.towers.word_pieces import warn_cut
from vqvae.storage.parts import ModelError

# our configurations, whose names begin with "mmwudao-"; open_clip.create_model can now build them by name
add_model_config(Path(__file__).parent / "model_configs")

TEXT_CONFIG = "text_config.json"  # the config of a Hugging Face text tower


class OpenClipTowers(Towers):
    """A model of open_clip, with the sections of its open_clip_config.json; `folder` holds the text tokenizer."""

    kind = "open-clip"

    def __init__(self, model_cfg: dict[str, Any], preprocess_cfg: dict[str, Any], folder: Path) -> None:
        super().__init__()
        check_open_clip(model_cfg, preprocess_cfg)
        self.model_cfg, self.preprocess_cfg = model_cfg, preprocess_cfg
        self.embed_dim = int(model_cfg["embed_dim"])
        text = model_cfg["text_cfg"]
        names = [TEXT_MODEL, *[TEXT_CONFIG] * ("hf_model_name" in text)]
        names += [*TOKENIZER_FILES] * bool(text.get("hf_tokenizer_name"))
        self._text_files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
        self.model = _build(model_cfg, folder)
        size = self.model.visual.image_size
        self.image_size = size if isinstance(size, int) else int(size[0])
        pictures = PreprocessCfg(**{**preprocess_cfg, "size": size})
        self.pixel_mean, self.pixel_std = pictures.mean, pictures.std
        self._transform = image_transform_v2(pictures, is_train=False)
        self._tokenizer: Any = _tokenizer(text, folder)
        self._context_length = int(text.get("context_length", 77))

    @property
    def scale(self) -> Tensor:
        scale: Tensor = self.model.logit_scale.exp()
        return scale

    @classmethod
    def from_config(cls, record: dict[str, Any], folder: Path) -> OpenClipTowers:
        return cls(record["model_cfg"], record["preprocess_cfg"], folder)

    @classmethod
    def from_scratch(cls, name: str, text_model: Path) -> OpenClipTowers:
        """The architecture that open_clip knows as `name`, with random weights and a SentencePiece vocabulary.

        Raises `ConfigError` for an unknown name, a Hugging Face text tower, or a model that also writes captions.
        """
        model_cfg = get_model_config(name) if name in list_models() else None
        if model_cfg is None:
            ours = ", ".join(known for known in list_models() if known.startswith("mmwudao-"))
            raise ConfigError(f"open_clip knows no model {name!r}; it knows {ours} and open_clip.list_models()")
        if "hf_model_name" in model_cfg["text_cfg"] or "multimodal_cfg" in model_cfg:
            raise ConfigError(f"{name} cannot be trained: its text tower must be open_clip's own, without a decoder")
        text_cfg = {key: value for key, value in model_cfg["text_cfg"].items() if "tokenizer" not in key}
        text_cfg["vocab_size"] = TextTokenizer(text_model).vocab_size + PieceTokenizer.special_tokens
        with tempfile.TemporaryDirectory() as folder:
            shutil.copyfile(text_model, Path(folder) / TEXT_MODEL)
            return cls({**model_cfg, "text_cfg": text_cfg}, {}, Path(folder))

    def to_config(self) -> dict[str, Any]:
        return {"model_cfg": self.model_cfg, "preprocess_cfg": self.preprocess_cfg}

    def text_files(self) -> dict[str, bytes]:
        return self._text_files

    def preprocess(self, image: Image.Image) -> Tensor:
        pixels: Tensor = self._transform(shortened(image))
        return pixels

    def tokenize(self, texts: list[str]) -> Tensor:
        """Ids [N, context_length]."""
        texts = [whole_characters(text) for text in texts]
        # one more token reveals which texts are cut
        longer = self._tokenizer(texts, context_length=self._context_length + 1)
        ids: Tensor = self._tokenizer(texts, context_length=self._context_length)
        warn_cut(int((longer[:, -1] != self._pad).sum()), len(texts), self._context_length)
        return ids

    @property
    def _pad(self) -> int:
        return int(self._tokenizer.tokenizer.pad_token_id) if isinstance(self._tokenizer, HFTokenizer) else 0

    def count_tokens(self, tokens: Tokens) -> list[int]:
        assert isinstance(tokens, Tensor)
        counts = token_counts(tokens, self._pad)
        if isinstance(self._tokenizer, HFTokenizer) and self._tokenizer.tokenizer.eos_token_id == self._pad:
            # SigLIP and others pad with the token that ends a text: the first of them is the text's own
            counts = [min(count + 1, tokens.shape[1]) for count in counts]
        return counts

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return unit(self.model.encode_image(pixels))

    def encode_tokens(self, tokens: Tokens) -> Tensor:
        return unit(self.model.encode_text(tokens))


class PieceTokenizer:
    """SentencePiece with the interface of open_clip's tokenizers: start token, pieces, end token, zeros.

    The end token has the largest id, since open_clip's text towers pool at the largest one (`pool_type` argmax).
    """

    special_tokens = 2  # start and end

    def __init__(self, text: TextTokenizer) -> None:
        self.text = text

    def __call__(self, texts: list[str], context_length: int) -> Tensor:
        """Ids [N, context_length]; a text that is too long is cut before the end token."""
        start, end = self.text.vocab_size, self.text.vocab_size + 1
        ids = torch.zeros(len(texts), context_length, dtype=torch.int64)
        for row, text in zip(ids, texts, strict=True):
            whole = torch.tensor([start, *self.text.encode(text)[: context_length - 2], end])
            row[: len(whole)] = whole
        return ids


def _build(model_cfg: dict[str, Any], folder: Path) -> Any:
    """The model that `open_clip.create_model` would make from this configuration, with random weights."""
    options = copy.deepcopy(model_cfg)
    custom = options.pop("custom_text", False) or "hf_model_name" in options["text_cfg"]
    if "timm_model_name" in options["vision_cfg"]:
        options["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in options["text_cfg"]:
        if not (folder / TEXT_CONFIG).is_file():
            name = options["text_cfg"]["hf_model_name"]
            raise ModelError(f"the text tower is {name}, whose config.json and tokenizer are needed (--text-model)")
        options["text_cfg"] |= {"hf_model_name": str(folder / TEXT_CONFIG), "hf_model_pretrained": False}
    model: type[nn.Module] = CLIP
    if custom:
        model = CoCa if "multimodal_cfg" in options else CustomTextCLIP
    return model(**options)


def _tokenizer(text: dict[str, Any], folder: Path) -> Any:
    if (folder / TEXT_MODEL).is_file():
        return PieceTokenizer(TextTokenizer(folder / TEXT_MODEL))
    options = {"context_length": text.get("context_length", 77), **text.get("tokenizer_kwargs", {})}
    if not text.get("hf_tokenizer_name"):
        return SimpleTokenizer(**options)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(f"the tokenizer is {text['hf_tokenizer_name']}, whose files are needed (--text-model)")
    return HFTokenizer(str(folder), tokenizer_mode=text.get("tokenizer_mode"), **options)
