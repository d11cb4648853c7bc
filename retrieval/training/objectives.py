"""The objectives of training: BriVL's cross-modal MoCo, CLIP's symmetric loss, SigLIP's pairwise loss.

Shapes: N pictures, M = V N texts (V captions of each picture: the first of every picture, then the second, ...), D the
width of the shared space, K slots of a queue. `ids` [n, 2] hold, for each feature, its pair in the whole batch and the
label of its concept: if several pictures of a batch show the same concept, a text of one describes the others too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Literal, Self

import torch
import torch.distributed as dist
from open_clip.loss import ClipLoss, SigLipLoss, gather_features
from torch import Tensor, nn
from torch.nn import functional as F

from data.config import ConfigError
from data.options import check_options, option
from retrieval.towers.base import Tokens, Towers
from vqvae.training.process import distributed, rank, world_size

Keys = tuple[Tensor, Tensor] | None
Labelled = tuple[Tensor, Tensor]  # features [n, D] and their ids [n, 2]
NO_PAIR = -1  # the pair of a queue's entry, which belongs to none in the batch


@dataclass
class ObjectiveConfig:
    """The loss and its parameters; those from `queue` on apply to `moco` only."""

    name: Literal["moco", "clip", "siglip"] = "clip"
    # other pictures of the same concept are positives like a text's own, left out of the loss, or negatives
    same_concept: Literal["positive", "left-out", "negative"] = "positive"
    temperature: float | None = option(
        None, "The temperature at the start; by default that of the towers.", above=0, most=1e6
    )
    learn_temperature: bool = True
    bias: float = option(
        -10.0, "The bias of siglip at the start: about -log(batch), the log odds of a positive.", least=-1e3, most=1e3
    )
    queue: int = option(
        4096, "Keys kept of each tower, which need not be a multiple of the batch.", least=1, most=2**24
    )
    momentum: float = option(0.99, "How much of its weights a momentum tower keeps a step.", least=0, below=1)
    top_k: int = option(
        0, "Slots among the top k of both keys of a pair are positives too (BriVL's multi-label); 0: none.",
        least=0, most=2**24,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_options(self)


def build_objective(towers: Towers, config: ObjectiveConfig, frozen: Sequence[str] = ()) -> Objective:
    """The objective that `config` names; `frozen` are names or patterns of parts to freeze (see `freeze`)."""
    return {"moco": Moco, "clip": Clip, "siglip": SigLip}[config.name](towers, config, frozen)


class Objective(nn.Module):
    """Towers with the loss as `forward`, so that DDP can wrap them. Raises `ConfigError` for a fixed temperature."""

    def __init__(self, towers: Towers, config: ObjectiveConfig, frozen: Sequence[str] = ()) -> None:
        super().__init__()
        self.towers, self.config = towers, config
        self.frozen = freeze(towers, frozen)
        log_scales = [parameter for name, parameter in towers.named_parameters() if _is_scale(name)]
        if config.temperature is not None and not log_scales:
            raise ConfigError("the temperature of these towers is fixed: leave objective.temperature out")
        for log_scale in log_scales:
            log_scale.requires_grad_(config.learn_temperature)
            if config.temperature is not None:
                nn.init.constant_(log_scale, -math.log(config.temperature))

    def train(self, mode: bool = True) -> Self:
        """As in PyTorch, but frozen parts stay in eval mode: no updates of batch statistics and no dropout."""
        super().train(mode)
        for towers in self.children():
            if isinstance(towers, Towers):
                for name in self.frozen:
                    towers.get_submodule(name).eval()
        return self

    def forward(
        self, pixels: Tensor, tokens: Tokens, labels: Tensor, lesson: Callable[[Towers], Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The "loss" and the "temperature" of pictures [N, 3, H, W], the tokens of their M texts and concepts [N].

        A `lesson` gives a loss of the towers that is added. It is computed in here, where DDP sees its gradients.
        """
        images = self.towers.encode_pixels(pixels)
        texts = self.towers.encode_tokens(tokens)
        ids, text_ids = pair_ids(labels, len(texts))
        keys = self.encode_keys(pixels, tokens)
        with torch.autocast(images.device.type, enabled=False):  # logits need float32
            loss = self.loss(images, texts, ids, text_ids, keys)
        figures = {"loss": loss, "temperature": 1 / self.towers.scale.detach()}
        if lesson:
            learned = lesson(self.towers)
            figures |= {"loss": loss + learned, "contrast": loss.detach(), "lesson": learned.detach()}
        return figures

    def encode_keys(self, pixels: Tensor, tokens: Tokens) -> Keys:
        """Features of the same pictures and texts by momentum towers; None for objectives without them."""
        return None

    def loss(self, images: Tensor, texts: Tensor, ids: Tensor, text_ids: Tensor, keys: Keys) -> Tensor:
        """The loss of features [N, D] and [M, D], a scalar; its mean over processes is that of the whole batch."""
        raise NotImplementedError


class Clip(Objective):
    """CLIP's symmetric cross-entropy (Radford et al. 2021, section 2.3), with any number of positives."""

    def loss(self, images: Tensor, texts: Tensor, ids: Tensor, text_ids: Tensor, keys: Keys) -> Tensor:
        return clip_loss((images, ids), (texts, text_ids), self.towers.scale, self.config)


class SigLip(Objective):
    """SigLIP's loss (Zhai et al. 2023, arXiv:2303.15343, section 3.2): a binary one for each picture and text."""

    def __init__(self, towers: Towers, config: ObjectiveConfig, frozen: Sequence[str] = ()) -> None:
        super().__init__(towers, config, frozen)
        self.bias = nn.Parameter(torch.tensor(config.bias))

    def loss(self, images: Tensor, texts: Tensor, ids: Tensor, text_ids: Tensor, keys: Keys) -> Tensor:
        if distributed():
            _, texts = gather_features(images, texts, True, True, rank(), world_size())
        logits = SigLipLoss().get_logits(images, texts, self.towers.scale, self.bias)
        positive, counted = pairs(ids, gather(text_ids), self.config)
        signs = positive.to(logits.dtype) * 2 - 1
        return -(F.logsigmoid(signs * logits) * counted).sum() / len(logits)


class Moco(Objective):
    """BriVL's cross-modal contrast (Huo et al. 2021, section 3.3): queries against momentum keys and queues of them.

    Unlike the original, the keys of the whole batch are candidates as well as the queue, the queue starts empty instead
    of random, positives are averaged instead of summed, and batches are not shuffled for the keys, since the batch
    statistics of pictures reveal nothing about a text. If a picture has several captions, the first is queued.
    """

    def __init__(self, towers: Towers, config: ObjectiveConfig, frozen: Sequence[str] = ()) -> None:
        super().__init__(towers, config, frozen)
        self.keys = copy.deepcopy(towers).requires_grad_(False)
        self.register_buffer("image_queue", torch.zeros(config.queue, towers.embed_dim))
        self.register_buffer("text_queue", torch.zeros(config.queue, towers.embed_dim))
        self.register_buffer("queue_ids", torch.full((config.queue, 2), NO_PAIR))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))  # number of pairs since the start
        self.image_queue: Tensor
        self.text_queue: Tensor
        self.queue_ids: Tensor
        self.pushed: Tensor

    @torch.no_grad()
    def encode_keys(self, pixels: Tensor, tokens: Tokens) -> Keys:
        if self.training:
            self.follow()
        return self.keys.encode_pixels(pixels), self.keys.encode_tokens(tokens)

    def loss(self, images: Tensor, texts: Tensor, ids: Tensor, text_ids: Tensor, keys: Keys) -> Tensor:
        assert keys is not None
        image_keys, text_keys = keys
        with torch.no_grad():
            first = text_keys[: len(images)]
            filled = min(int(self.pushed), self.config.queue)
            image_queue, text_queue = self.image_queue[:filled].clone(), self.text_queue[:filled].clone()
            near = near_both(image_keys @ image_queue.T, first @ text_queue.T, self.config.top_k)
            queue_ids = self.queue_ids[:filled].clone()
            if self.training:
                self.push(gather(image_keys), gather(first), gather(ids))
        all_text_ids, all_ids = gather(text_ids), gather(ids)
        text_candidates = torch.cat([gather(text_keys), text_queue]), torch.cat([all_text_ids, queue_ids])
        image_candidates = torch.cat([gather(image_keys), image_queue]), torch.cat([all_ids, queue_ids])
        to_texts = self._contrast((images, ids), text_candidates, near)
        to_images = self._contrast((texts, text_ids), image_candidates, near)
        return (to_texts + to_images) / 2

    def _contrast(self, queries: Labelled, candidates: Labelled, near: Tensor) -> Tensor:
        """The loss of queries against candidates, the last of which are the queue; `near` [N, K]: extra positives."""
        (features, ids), (keys, key_ids) = queries, candidates
        logits = self.towers.scale * features @ keys.T
        positive, counted = pairs(ids, key_ids, self.config)
        extra = F.pad(near.repeat(len(features) // len(near), 1), (len(keys) - near.shape[1], 0))
        return cross_entropy(logits, positive | extra, counted | extra)

    @torch.no_grad()
    def follow(self) -> None:
        """Move the key towers towards the trained ones (Huo et al. 2021, eqs. 3 and 4)."""
        for key, trained in zip(self.keys.parameters(), self.towers.parameters(), strict=True):
            key.lerp_(trained, 1 - self.config.momentum)

    @torch.no_grad()
    def push(self, image_keys: Tensor, text_keys: Tensor, ids: Tensor) -> None:
        """Write pairs of keys [n, D] over the oldest in the queues; of more than K pairs, the last K."""
        size, count = self.config.queue, len(ids)
        kept = slice(max(0, count - size), count)
        slots = torch.arange(count, device=ids.device)[kept].add(self.pushed) % size
        self.image_queue[slots], self.text_queue[slots] = image_keys[kept], text_keys[kept]
        self.queue_ids[slots, 1] = ids[kept, 1]
        self.pushed += count


def clip_loss(images: Labelled, texts: Labelled, scale: Tensor, config: ObjectiveConfig) -> Tensor:
    """The loss of `Clip` of pictures and their texts: a scalar, whose mean over processes is that of the whole batch.

    Those of all processes are compared, and gradients reach all of them.
    """
    (image_features, ids), (text_features, text_ids) = images, texts
    across = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank(), world_size=world_size())
    to_texts, to_images = across.get_logits(image_features, text_features, scale)
    image_loss = cross_entropy(to_texts, *pairs(ids, gather(text_ids), config))
    return (image_loss + cross_entropy(to_images, *pairs(text_ids, gather(ids), config))) / 2


def pair_ids(labels: Tensor, texts: int) -> tuple[Tensor, Tensor]:
    """The `ids` of this process's N pictures of concepts `labels` [N], and of their `texts`: [N, 2] and [M, 2]."""
    pair = torch.arange(len(labels), device=labels.device) + rank() * len(labels)
    ids = torch.stack([pair, labels], dim=1)
    return ids, ids.repeat(texts // len(labels), 1)


def pairs(ids: Tensor, candidate_ids: Tensor, config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """Which candidates [c, 2] are positives of queries [n, 2], and which count at all; both bool [n, c]."""
    own = ids[:, None, 0] == candidate_ids[None, :, 0]
    same = ids[:, None, 1] == candidate_ids[None, :, 1]
    positive = own | same if config.same_concept == "positive" else own
    counted = own | ~same if config.same_concept == "left-out" else torch.ones_like(own)
    return positive, counted


def cross_entropy(logits: Tensor, positive: Tensor, counted: Tensor) -> Tensor:
    """The mean over queries of the mean over positives of -log softmax, over the candidates that count [n, c].

    With several positives, L_out of Khosla et al. 2020 (arXiv:2004.11362, eq. 2).
    """
    log_shares = logits.masked_fill(~counted, -torch.inf).log_softmax(dim=1)
    return -(log_shares.masked_fill(~positive, 0).sum(dim=1) / positive.sum(dim=1)).mean()


def near_both(image_scores: Tensor, text_scores: Tensor, k: int) -> Tensor:
    """Slots among the k best by image and by text, bool [N, K]: BriVL's additional positives (multi-label MoCo)."""
    k = min(k, image_scores.shape[1])
    by_image, by_text = (
        torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(k).indices, True)
        for scores in (image_scores, text_scores)
    )
    return by_image & by_text


def gather(tensor: Tensor) -> Tensor:
    """The rows of all processes in the order of their ranks, without gradients."""
    if not distributed():
        return tensor
    rows = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(rows, tensor.contiguous())
    return torch.cat(rows)


def freeze(towers: Towers, patterns: Sequence[str]) -> list[str]:
    """Freeze the parts whose names match `patterns` (shell wildcards); returns their names.

    Raises `ConfigError` for a pattern that matches no part, and if nothing is left to train.
    """
    modules = {name: module for name, module in towers.named_modules() if name}
    frozen = []
    for pattern in patterns:
        names = [name for name in modules if fnmatch(name, pattern)]
        if not names:
            parts = ", ".join(name for name, _ in towers.named_children())
            raise ConfigError(f"freeze: the towers have no part {pattern!r}; the top-level parts are {parts}")
        frozen += names
    for name in frozen:
        modules[name].requires_grad_(False)
    if not any(parameter.requires_grad for name, parameter in towers.named_parameters() if not _is_scale(name)):
        raise ConfigError("freeze leaves nothing to train")
    return frozen


def _is_scale(name: str) -> bool:
    return name.rpartition(".")[2] == "logit_scale"  # as in open_clip
