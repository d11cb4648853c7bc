"""Training pairs: the codes of all pictures of a split, with their samples."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from torch import Tensor

from data.codes import read_codes
from data.sample import DataError
from generation.rows.base import CodedPicture


class CodedPairs:
    """Every coded picture of a split, in memory: a million pictures of 256 codes take a gigabyte.

    `samples` are the P samples and `codes` int32 [P, h, w], since PyTorch can do little with uint16. `views` are the
    codes of other views of the pictures, int32 [P, K, h, w], if all have K of them.
    """

    def __init__(
        self, folder: Path, split: str, exclude_families: Sequence[str] = (), family: str | None = None
    ) -> None:
        """Read the pictures that are not of `exclude_families`, and of `family` alone if it is given.

        Raises `DataError` when none is left, or when they differ in size.
        """
        coded = list(read_codes(folder, split))
        kept = [c for c in coded if c.sample.family not in exclude_families]
        if family is not None:
            kept = [c for c in kept if c.sample.family == family]
        if not kept:
            families = ", ".join(sorted({str(c.sample.family) for c in coded})) or "none"
            wanted = f" ({family})" if family else ""
            raise DataError(
                f"split {split!r} of {folder} holds no pictures of the chosen families{wanted}; it has {families}"
            )
        if len({c.codes.shape for c in kept}) > 1:
            raise DataError(f"the pictures of {folder} differ in size; tokenize them at one size")
        self.samples = [c.sample for c in kept]
        self.codes = torch.stack([torch.from_numpy(c.codes.astype(numpy.int32)) for c in kept])
        views = [torch.from_numpy(c.views.astype(numpy.int32)) for c in kept if c.views is not None]
        if views and (len(views) < len(kept) or len({one.shape for one in views}) > 1):
            raise DataError(f"the pictures of {folder} differ in the number of their other views; tokenize them anew")
        self.views = torch.stack(views) if views else None

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) in codes."""
        return self.codes.shape[1], self.codes.shape[2]

    def picture(self, index: int, rng: random.Random | None = None) -> CodedPicture:
        """The picture at a place of `samples`; with `rng`, itself or one of its other views, all equally likely."""
        codes = self.codes[index]
        if rng is not None and self.views is not None:
            view = rng.randrange(1 + self.views.shape[1])
            codes = self.views[index, view - 1] if view else codes
        return CodedPicture(self.samples[index], codes)

    def sampling_weights(self, balance: float) -> Tensor:
        """Float64 [P]: (number of pictures of the same base concept and family) ** -balance.

        With 0, every picture is equally likely. Skin tones and genders multiply some concepts by up to 112; with 1, all
        variants of a concept together count as one picture.
        """
        keys = [(s.base_concept or s.id, s.family) for s in self.samples]
        counts = Counter(keys)
        return torch.tensor([counts[key] ** -balance for key in keys], dtype=torch.float64)

    def histogram(self, num_codes: int) -> Tensor:
        """How often each code occurs, int64 [num_codes]."""
        return torch.bincount(self.codes.flatten().long(), minlength=num_codes)


def unigram_bits(train: CodedPairs, test: CodedPairs, num_codes: int) -> float:
    """Bits per image token of `test` under the code frequencies of `train` (add-one smoothed): the baseline."""
    counts = (train.histogram(num_codes) + 1).double()
    cost = -(counts / counts.sum()).log2()
    return float(cost[test.codes.flatten().long()].mean())
