"""A student in its teacher's place: the text head is fitted to what the student makes of texts."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from retrieval.encoders.text_encoder import TextEncoder
from retrieval.towers.pretrained import VECTORS, PretrainedTowers
from retrieval.training.inherit import TextVectors

BATCH = 1024  # texts

log = logging.getLogger(__name__)


class TextHeadFit:
    """Towers of a teacher -> towers of its student, whose text vectors are as near to the teacher's as the head can.

    A student's vectors differ from its teacher's in their own way, and a head of the teacher's reads them badly.
    Texts alone are needed: the target of each is the text vector of the teacher's towers. Pictures stay where they are.
    """

    def __init__(self, student: TextEncoder, teacher: TextVectors, file: Path) -> None:
        """`teacher` holds the teacher's vectors of the texts to fit on; the student's are kept in `file`."""
        self.student, self.teacher = student, teacher
        self.vectors = TextVectors.prepare(student, list(teacher.rows), file)

    def __call__(self, towers: PretrainedTowers, steps: int, learning_rate: float = 5e-4) -> PretrainedTowers:
        """The towers with the student and a text head that took `steps` steps of AdamW."""
        fitted = towers.with_text_encoder(self.student)
        wanted = self._targets(towers)
        head = fitted.text_head.train()
        optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=0.01)
        generator = torch.Generator().manual_seed(0)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * (1 - step / steps)
            rows = torch.randint(len(wanted), (BATCH,), generator=generator)
            distance = 1 - F.cosine_similarity(head(self.vectors.vectors[rows].float()), wanted[rows]).mean()
            optimizer.zero_grad(set_to_none=True)
            distance.backward()
            optimizer.step()
        fitted.eval()
        before, after = (self._nearness(part, wanted) for part in (towers, fitted))
        log.info("text vectors by the student: cosine with the teacher's %.3f, %.3f before the fit", after, before)
        return fitted

    @torch.no_grad()
    def _targets(self, towers: PretrainedTowers) -> Tensor:
        parts = self.teacher.vectors.split(BATCH)
        return torch.cat([towers.encode_tokens({VECTORS: part.float()}) for part in parts])

    @torch.no_grad()
    def _nearness(self, towers: PretrainedTowers, wanted: Tensor) -> float:
        """The mean cosine of what the head of `towers` makes of the student's vectors with what is wanted."""
        found = [towers.encode_tokens({VECTORS: part.float()}) for part in self.vectors.vectors.split(BATCH)]
        return float((torch.cat(found) * wanted).sum(dim=1).mean())
