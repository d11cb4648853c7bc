"""BriVL 1.0's training step as published (Huo et al. 2021, section 3.3), quirks included, on one device.

Use it for comparisons and to continue training published weights. New towers are trained by
`retrieval.training.objectives.Moco`; docs/retrieval-imports.md lists the differences. N pairs, D width of the common
space, K slots of a queue.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.options import check_options, option
from retrieval.towers.brivl import BrivlTowers, trainable_names


@dataclass(frozen=True)
class BrivlMocoConfig:
    """Slots among the `top_k` nearest to both keys of a pair are positives too; 0, as published, disables this."""

    queue: int = option(9600, "Keys kept of each tower.", least=1, most=2**24)
    momentum: float = option(0.99, "How much of its weights a momentum tower keeps a step.", least=0, below=1)
    top_k: int = option(0, "How many nearest slots are positives too.", least=0, most=2**24)

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class BrivlBatch:
    """N pairs as `BrivlTowers.preprocess`, `place_boxes` and `tokenize` make them."""

    pixels: Tensor  # [N, 3, S, S]
    boxes: Tensor  # [N, B, 4]
    box_mask: Tensor  # [N, B]
    ids: Tensor  # [N, L]
    text_mask: Tensor  # [N, L]


class BrivlMoco(nn.Module):
    """Towers, their momentum copies and two queues of keys; `forward` returns the loss of a step and updates all.

    Freezes what the original does not train (`trainable_names`). The momentum copies start with the towers' weights,
    and the queues with random unit columns.
    """

    def __init__(self, towers: BrivlTowers, config: BrivlMocoConfig) -> None:
        super().__init__()
        self.config = config
        self.towers = towers
        self.keys = copy.deepcopy(towers).requires_grad_(False)
        trained = trainable_names(towers)
        for name, parameter in towers.named_parameters():
            parameter.requires_grad_(name in trained)
        size = (towers.embed_dim, config.queue)
        self.register_buffer("image_queue", F.normalize(torch.randn(size), dim=0))
        self.register_buffer("text_queue", F.normalize(torch.randn(size), dim=0))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.image_queue: Tensor
        self.text_queue: Tensor
        self.pointer: Tensor

    def forward(self, batch: BrivlBatch, image_order: Tensor | None = None, text_order: Tensor | None = None) -> Tensor:
        """The sum of both directions' losses, a scalar. The orders [N] are random permutations unless given.

        Raises `ValueError` if K is not a multiple of N.
        """
        count = len(batch.pixels)
        if self.config.queue % count:
            raise ValueError(f"the queue of {self.config.queue} is not a multiple of the batch of {count}: change one")
        images = self.towers.encode_pixels(batch.pixels, batch.boxes, batch.box_mask)
        texts = self.towers.encode_tokens({"ids": batch.ids, "mask": batch.text_mask})
        image_keys, text_keys = self.encode_keys(
            batch,
            torch.randperm(count) if image_order is None else image_order,
            torch.randperm(count) if text_order is None else text_order,
        )
        extra = self.extra_positives(image_keys, text_keys)
        to_images = self.logits(texts, image_keys, self.image_queue)
        to_texts = self.logits(images, text_keys, self.text_queue)
        loss = contrast(to_images, extra) + contrast(to_texts, extra)
        self.push(image_keys, text_keys)
        return loss

    @torch.no_grad()
    def encode_keys(self, batch: BrivlBatch, image_order: Tensor, text_order: Tensor) -> tuple[Tensor, Tensor]:
        """Update the momentum towers, encode the batch with them in the given orders, and return both in batch order.

        Returns [N, D] twice. As in the original, the box mask is not shuffled: a picture gets the mask of another.
        """
        keys: list[Tensor] = list(self.keys.parameters())
        torch._foreach_mul_(keys, self.config.momentum)
        torch._foreach_add_(keys, [p.detach() for p in self.towers.parameters()], alpha=1 - self.config.momentum)
        images = self.keys.encode_pixels(batch.pixels[image_order], batch.boxes[image_order], batch.box_mask)
        texts = self.keys.encode_tokens({"ids": batch.ids[text_order], "mask": batch.text_mask[text_order]})
        return images[image_order.argsort()], texts[text_order.argsort()]

    @torch.no_grad()
    def extra_positives(self, image_keys: Tensor, text_keys: Tensor) -> Tensor:
        """Slots among the `top_k` nearest to the text key and to the image key: bool [N, K]."""
        near = [
            torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(self.config.top_k).indices, True)
            for scores in (text_keys @ self.text_queue, image_keys @ self.image_queue)
        ]
        return near[0] & near[1]

    def logits(self, queries: Tensor, keys: Tensor, queue: Tensor) -> Tensor:
        """[N, 1 + K]: each query's own key, then the queue (cloned: `push` changes it before the backward pass)."""
        own = (queries * keys).sum(1, keepdim=True)
        return torch.cat([own, queries @ queue.clone()], dim=1) * self.towers.scale

    @torch.no_grad()
    def push(self, image_keys: Tensor, text_keys: Tensor) -> None:
        """Write keys [N, D] over the oldest columns."""
        start, count = int(self.pointer), len(image_keys)
        self.image_queue[:, start : start + count] = image_keys.T
        self.text_queue[:, start : start + count] = text_keys.T
        self.pointer.fill_((start + count) % self.config.queue)


def contrast(logits: Tensor, extra: Tensor) -> Tensor:
    """-log softmax of logits [N, 1 + K], summed over column 0 and the extra positives [N, K], per query."""
    positive = F.pad(extra, (1, 0), value=True)
    return -logits.log_softmax(dim=1)[positive].sum() / len(logits)
