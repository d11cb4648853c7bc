"""A text encoder as a part of its own: BERT or XLM-R with its tokenizer, in a folder.

config.json           `TextEncoderConfig`
model.safetensors     the weights; matrices as 4-bit blocks (`blocks.py`), if `bits` is 4
tokenizer.json        of the library tokenizers
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from data.atomic import new_folder
from data.characters import whole_characters
from data.config import ConfigError, from_dict, to_dict
from data.options import check_options, option
from data.records import parse_json
from retrieval.encoders.bert import MODEL_TYPES, bert_of
from vqvae.storage.blocks import packed_tensors, unpacked_tensors
from vqvae.storage.parts import ModelError, disk_errors

log = logging.getLogger(__name__)

FORMAT = "mmwudao-text-encoder/1"
TOKENIZER = "tokenizer.json"


@dataclass
class TextEncoderConfig:
    """What turns texts into vectors: the network, how its tokens become one vector, and what comes before a text."""

    architecture: dict[str, Any] = field(default_factory=lambda: {"model_type": "bert"})  # as in transformers
    pooling: Literal["mean", "first"] = "mean"  # over the last layer's tokens, or its first token
    prefix: str = ""  # put before each text, as "query: " for E5
    max_tokens: int = option(64, "Tokens of a text at most, the start and the end included.", least=2, most=8192)
    pad_token: int = option(0, "The token that fills short texts up.", least=0, most=2**22)
    bits: Literal[4, 16, 32] = 16  # of a number in the file; 4: blocks for matrices (`blocks.py`)
    source: str = ""  # where the weights come from
    licence: str = ""

    def __post_init__(self) -> None:
        check_options(self)
        if self.pooling not in ("mean", "first"):
            raise ConfigError(f"the pooling of a text encoder is mean or first, not {self.pooling!r}")
        if self.architecture.get("model_type") not in MODEL_TYPES:
            raise ConfigError(
                f"a text encoder is of the type {', '.join(MODEL_TYPES)}, not {self.architecture.get('model_type')!r}"
            )


class TextEncoder(nn.Module):
    """Texts -> vectors [N, width] of the length that the pooling gives; E5 and its kin are compared by the cosine."""

    def __init__(self, config: TextEncoderConfig, tokenizer: bytes) -> None:
        """`tokenizer` is the content of a tokenizer.json. Raises `ConfigError` for parts that do not fit together."""
        super().__init__()
        self.config, self.serialised = config, tokenizer
        try:
            self.tokenizer = Tokenizer.from_str(tokenizer.decode())
        except Exception as error:  # tokenizers raises plain Exception
            raise ConfigError(f"{TOKENIZER} is no tokenizer ({' '.join(str(error).split())[:200]})") from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        try:
            self.transformer = bert_of({**config.architecture, "pad_token_id": config.pad_token})
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"no text encoder can be built: {' '.join(str(error).split())[:300]}") from error
        architecture = self.transformer.config
        self.width: int = architecture.hidden_size
        rows = architecture.vocab_size
        if self.tokenizer.get_vocab_size() > rows:
            raise ConfigError(
                f"the tokenizer knows {self.tokenizer.get_vocab_size()} pieces, the encoder has rows for {rows}"
            )
        places = architecture.max_position_embeddings - architecture.first_position
        if config.max_tokens > places:
            raise ConfigError(f"max_tokens is {config.max_tokens}; the encoder has {places} positions")

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Ids, int64 [N, L], padded; L is the longest length. A text that is too long is cut, with a warning."""
        most, rows = self.config.max_tokens, []
        encodings = self.tokenizer.encode_batch([self.config.prefix + whole_characters(text) for text in texts])
        for text, encoding in zip(texts, encodings, strict=True):
            ids = encoding.ids
            if len(ids) > most:
                log.warning("a text of %d tokens is cut to %d: %.40r", len(ids), most, text)
                ids = [*ids[: most - 1], ids[-1]]  # the end token stays
            rows.append(torch.tensor(ids, dtype=torch.int64))
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.config.pad_token)

    def forward(self, tokens: Tensor) -> Tensor:
        """Ids [N, L] -> [N, width], in the dtype of the weights."""
        present = tokens != self.config.pad_token
        hidden: Tensor = self.transformer(tokens, present)
        if self.config.pooling == "first":
            return hidden[:, 0]
        present = present[..., None]
        return (hidden * present).sum(dim=1) / present.sum(dim=1)

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch_size: int = 128) -> Tensor:
        """Texts -> float32 [N, width] of unit length, without gradients; similar lengths are computed together."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        vectors = torch.zeros(len(texts), self.width)
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            device = next(self.parameters()).device
            found = self(self.tokenize([texts[index] for index in part]).to(device))
            vectors[part] = F.normalize(found.float(), dim=-1).cpu()
        return vectors


def save_text_encoder(encoder: TextEncoder, folder: Path) -> Path:
    """Write the folder atomically, with numbers of `config.bits` bits. Returns `folder`."""
    from safetensors.torch import save_file

    record = {"format": FORMAT, **to_dict(encoder.config)}
    with new_folder(folder, replace=True) as building:
        tensors = packed_tensors(encoder.transformer.state_dict(), encoder.config.bits)
        with disk_errors():
            save_file(tensors, building / "model.safetensors")
        (building / "model.safetensors").chmod(0o644)  # safetensors writes private files
        text = json.dumps(record, ensure_ascii=False, indent=1) + "\n"
        (building / "config.json").write_text(text, encoding="utf-8")
        (building / TOKENIZER).write_bytes(encoder.serialised)
    return folder


def load_text_encoder(folder: Path) -> TextEncoder:
    """The text encoder in a folder, float32, in eval mode. Raises `ModelError` for what is missing or does not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in ("config.json", "model.safetensors", TOKENIZER):
        if not (folder / name).is_file():
            raise ModelError(
                f"{folder} holds no text encoder: {name} is missing (mmwudao import text-encoder makes one)"
            )
    try:
        record = parse_json((folder / "config.json").read_bytes())
        if not isinstance(record, dict) or record.pop("format", None) != FORMAT:
            raise ModelError(f'{folder / "config.json"} describes no text encoder: its "format" must be {FORMAT!r}')
        encoder = TextEncoder(from_dict(TextEncoderConfig, record), (folder / TOKENIZER).read_bytes())
        shapes = {name: tuple(tensor.shape) for name, tensor in encoder.transformer.state_dict().items()}
        encoder.transformer.load_state_dict(unpacked_tensors(load_file(folder / "model.safetensors"), shapes))
    except ModelError:
        raise
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())  # PyTorch lists each tensor that does not fit on its own line
        raise ModelError(f"{folder} does not hold a text encoder: {reason[:300]}") from error
    return encoder.eval()
