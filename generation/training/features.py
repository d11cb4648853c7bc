"""The vectors of captions and pictures on disk, so that no step of a training waits for the towers.

A vector is of a picture's name in one language, without keywords or style: those texts are known before training
begins, and a style phrase tells nothing about what is shown. The file is safetensors: `texts` uint8 [N, 16], the
beginnings of the texts' SHA-256, and `vectors` float16 [N, n, C]; its metadata name the towers by content hash. The
vector of a picture is found by its sample's id, as if "picture " and the id were a text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from data.atomic import write_file
from data.config import ConfigError
from data.reading import Example
from data.sample import DataError, Sample
from vqvae.training.process import print_once

FORMAT = "mmwudao-features/1"
DIGEST = 16  # bytes
BATCH = 1024  # texts
PICTURES = 64


class FeatureEncoder(Protocol):
    """Frozen towers that make the vectors of prompts."""

    @property
    def hash(self) -> str:
        """The content hash of their stored weights."""

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Float32 [N, C] of N texts."""

    def encode_image(self, images: Sequence[Image.Image]) -> Tensor:
        """Float32 [N, C] of N pictures."""


class StoredFeatures:
    """The vectors in a file, in memory; a `FeatureSource`."""

    def __init__(self, path: Path) -> None:
        """Raises `DataError` for a file that is missing or damaged."""
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise DataError(f"{path} holds no prompt features: its format is {metadata.get('format')!r}")
                texts, self._vectors = file.get_tensor("texts"), file.get_tensor("vectors")
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path} is missing, truncated or damaged ({error}): remove it, to make it anew") from error
        self.towers_hash = metadata["towers"]
        self._places = {bytes(row): place for place, row in enumerate(texts.numpy())}

    def __contains__(self, text: str) -> bool:
        return _digest(text) in self._places

    @property
    def width(self) -> int:
        return self._vectors.shape[-1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What the file holds."""
        digests = b"".join(self._places)
        return {"texts": _bytes(digests), "vectors": self._vectors}

    def of_text(self, text: str) -> Tensor:
        """Float32 [n, C] of a text. Raises `DataError` for one that the file lacks."""
        place = self._places.get(_digest(text))
        if place is None:
            raise DataError(f"{self.path} holds no vector of {text!r}")
        return self._vectors[place].float()

    def of_sample(self, id: str) -> Tensor:
        """Float32 [n, C] of the picture of a sample. Raises `DataError` for one that the file lacks."""
        return self.of_text(picture_key(id))


def prepare_features(
    path: Path,
    encoder: FeatureEncoder,
    texts: Iterable[str],
    ids: Iterable[str] = (),
    pictures: Iterable[Example] = (),
) -> StoredFeatures:
    """The file at `path` with a vector of each text and of each sample of `ids`; what it lacks is computed and added.

    `pictures` are read only if the file lacks a sample. Raises `ConfigError` for a file of other towers, `DataError`
    for one that is damaged.
    """
    from safetensors.torch import save

    stored = StoredFeatures(path) if path.exists() else None
    if stored is not None and stored.towers_hash != encoder.hash:
        raise ConfigError(
            f"{path} holds vectors of the towers {stored.towers_hash[:12]}, not of these ({encoder.hash[:12]}): "
            "give data.features another name, or remove the file"
        )
    missing = sorted({text for text in texts if stored is None or text not in stored})
    missing.sort(key=len)  # stable; a batch is padded to its longest text
    keys = [*missing]
    made = [encoder.encode_text(missing[i : i + BATCH]) for i in range(0, len(missing), BATCH)]
    wanted = {id for id in ids if stored is None or picture_key(id) not in stored}
    for batch in _batches(pictures if wanted else (), wanted):
        keys += [picture_key(one.sample.id) for one in batch]
        made.append(encoder.encode_image([one.image for one in batch]))
    if stored is not None and not keys:
        return stored
    print_once(f"{path}: {len(missing)} vectors of texts made, {len(keys) - len(missing)} of pictures")
    vectors = torch.cat(made).half().unsqueeze(1)
    tensors = {"texts": _bytes(b"".join(map(_digest, keys))), "vectors": vectors}
    if stored is not None:
        tensors = {name: torch.cat([old, tensors[name]]) for name, old in stored.tensors.items()}
    write_file(path, save(tensors, {"format": FORMAT, "towers": encoder.hash}))
    return StoredFeatures(path)


def _batches(pictures: Iterable[Example], wanted: set[str]) -> Iterator[list[Example]]:
    examples = (one for one in pictures if one.sample.id in wanted)
    while batch := list(islice(examples, PICTURES)):
        yield batch


def picture_key(id: str) -> str:
    """What the vector of a sample's picture is found by."""
    return f"picture {id}"


def caption_names(samples: Iterable[Sample]) -> set[str]:
    """The names of pictures in all languages: what rows that draw have vectors of."""
    return {caption.name for sample in samples for caption in sample.captions.values()}


def _digest(text: str) -> bytes:
    return sha256(text.encode()).digest()[:DIGEST]


def _bytes(digests: bytes) -> Tensor:
    return torch.frombuffer(bytearray(digests), dtype=torch.uint8).view(-1, DIGEST)
