"""Retrieval metrics: ranks, recall at k and median rank; every candidate of the query's concept is right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from data.concepts import concept_label

RECALL_AT = (1, 5, 10)


def concept_labels(names: Iterable[str]) -> Tensor:
    """int64 [N]: `concept_label` of each name."""
    return torch.tensor([concept_label(name) for name in names], dtype=torch.int64)


def ranks(
    queries: Tensor, candidates: Tensor, query_labels: Tensor, candidate_labels: Tensor, chunk: int = 1024
) -> Tensor:
    """The rank, from 1, of the best candidate with the query's label: int64 [Q], 0 if no candidate has it.

    `queries` [Q, D] and `candidates` [C, D] are compared by dot product; the labels are integers [Q] and [C]. Wrong
    candidates with the same score rank before the right one, so that constant features score no recall.
    """
    parts = []
    for part, labels in zip(queries.split(chunk), query_labels.split(chunk), strict=True):
        scores = part.float() @ candidates.float().T
        right = labels[:, None] == candidate_labels[None, :]
        best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        position = 1 + ((scores >= best) & ~right).sum(dim=1)
        parts.append(torch.where(right.any(dim=1), position, 0))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def recall_figures(positions: Tensor, recall_at: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """`recall@k` for each k, `median_rank` and the number of `queries`, from the ranks [Q] of `ranks`.

    Only queries that have a right candidate count. Raises `ValueError` if none has.
    """
    positions = positions[positions > 0]
    if not len(positions):
        raise ValueError("no query has a candidate of its concept: nothing to measure")
    figures = {f"recall@{k}": float((positions <= k).double().mean()) for k in recall_at}
    return figures | {"median_rank": float(positions.double().quantile(0.5)), "queries": float(len(positions))}
