"""Training that starts from encoders trained elsewhere: their vectors on disk, and what the trunk must not forget."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from data.atomic import new_file
from data.concepts import concept_label, label_of
from data.config import ConfigError
from data.options import check_options, option
from data.sample import Sample
from retrieval.encoders.text_encoder import TextEncoder, load_text_encoder
from retrieval.towers.base import Towers, to_device
from retrieval.towers.pretrained import VECTORS, HeadsConfig, PretrainedTowers
from retrieval.training.objectives import NO_PAIR, Clip, ObjectiveConfig, cross_entropy, gather, pairs
from retrieval.training.pairs import Pictures, RetrievalCaptionConfig, mirror
from vqvae.storage.parts import content_hash, disk_errors
from vqvae.training.process import rank, replica, replicas, world_size
from vqvae.trunk import Trunk, load_trunk

NEGATIVES, NEGATIVE_LABELS, LOGITS = "negatives", "negative_labels", "logits"


class InheritedBatch(NamedTuple):
    """uint8 pictures [N, 3, S, S]; the vectors of their texts and of others; labels [N]; a seed."""

    pixels: Tensor
    tokens: dict[str, Tensor]
    labels: Tensor
    seed: int


@dataclass(frozen=True)
class BatchSettings:
    """How `InheritedBatches` draws; `batch_size` counts the pictures of a step over all processes."""

    batch_size: int
    accumulate: int
    seed: int
    balance: float
    negatives: int
    captions: RetrievalCaptionConfig
    mirror: float = 0.0


log = logging.getLogger(__name__)


@dataclass
class InitConfig:
    """Which encoders to start from (`mmwudao import text-encoder`, `mmwudao import trunk`); both or none."""

    text: str = option("", "The folder of a text encoder, whose vectors are computed once and kept beside the run.")
    image: str = option("", "The folder of a trunk.")
    student: str = option(
        "", "A text encoder distilled from `text`, which takes its place in the towers that are saved."
    )
    student_steps: int = option(
        3000, "Steps that fit the text head to the student, on texts alone, before the towers are saved.", least=0
    )

    def __post_init__(self) -> None:
        check_options(self)
        if bool(self.text) != bool(self.image):
            raise ConfigError("init needs both text and image, the folders of a text encoder and of a trunk")
        if self.student and not self.text:
            raise ConfigError("init.student is the student of init.text, which is not given")


@dataclass
class KeepConfig:
    """What holds the trunk to what it knew while it learns new pictures."""

    logits: float = option(
        0.5, "Weight of the divergence of its class probabilities from the untouched trunk's.", least=0
    )
    negatives: int = option(1024, "Texts without pictures in each batch, to which pictures must not be near.", least=0)
    classes: bool = option(True, "Add the text vectors of the trunk's likely ImageNet classes to pictures' vectors.")
    wise: float = option(
        1.0, "Share of the tuned trunk in what is saved and evaluated; the rest is the untouched trunk.",
        least=0, most=1,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_options(self)


def build_pretrained_towers(init: InitConfig, heads: HeadsConfig, keep: KeepConfig) -> PretrainedTowers:
    """Towers on the encoders in the folders of `init`. Raises `ModelError` or `ConfigError`."""
    text, trunk = load_text_encoder(Path(init.text)), load_trunk(Path(init.image))
    if not keep.classes:
        heads = replace(heads, class_weight=0.0)
    return PretrainedTowers.from_parts(text, trunk, heads).eval()


@contextmanager
def mixed_trunk(trunk: Trunk, untouched: Mapping[str, Tensor], share: float) -> Iterator[None]:
    """Inside, the trunk's weights are share * its own + (1 - share) * `untouched`; afterwards its own again.

    WiSE-FT (Wortsman et al. 2022, arXiv:2109.01903, section 3).
    """
    if share == 1:
        yield
        return
    state = trunk.state_dict()
    own = {name: tensor.clone() for name, tensor in state.items()}
    try:
        with torch.no_grad():
            for name, tensor in state.items():
                if tensor.is_floating_point():  # the others are counters
                    tensor.lerp_(untouched[name].to(tensor), 1 - share)
        yield
    finally:
        trunk.load_state_dict(own)


def imagenet_names(classes: int) -> list[str]:
    """The English names of the ImageNet-1k classes; of another number of classes, none."""
    from timm.data import ImageNetInfo

    return list(ImageNetInfo().label_descriptions()) if classes == 1000 else []


def texts_of(samples: Sequence[Sample]) -> list[str]:
    """The names and single keywords of the samples' captions, each once, in order."""
    found: dict[str, None] = {}
    for sample in samples:
        for caption in sample.captions.values():
            found[caption.name] = None
            found.update(dict.fromkeys(caption.keywords))
    return list(found)


class TextVectors:
    """Text -> the text encoder's unit vector, from memory; vectors are kept in a file and computed once."""

    def __init__(self, texts: Sequence[str], vectors: Tensor) -> None:
        self.rows = {text: row for row, text in enumerate(texts)}
        self.vectors = vectors  # float16 [T, width]

    @classmethod
    def prepare(cls, encoder: TextEncoder, texts: Sequence[str], file: Path) -> Self:
        """The vectors of `texts`, read from `file` if it holds them all, else computed and written there."""
        key = sha256("\n".join([content_hash(encoder), *texts]).encode()).hexdigest()
        stored = read_cache(file, key)
        if stored is None:
            log.info("computing the vectors of %d texts", len(texts))
            stored = {"vectors": encoder.encode(texts).half()}
            write_cache(file, key, stored)
        return cls(texts, stored["vectors"])

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """float32 [N, width]. Raises `KeyError` for a text that was not prepared."""
        return self.vectors[[self.rows[text] for text in texts]].float()


class PictureFeatures(NamedTuple):
    """What the untouched trunk makes of each picture: pooled features [N, C] and class logits [N, classes], float16."""

    pooled: Tensor
    logits: Tensor

    @classmethod
    @torch.no_grad()
    def prepare(cls, trunk: Trunk, pixels: Tensor, file: Path) -> PictureFeatures:
        """Of uint8 `pixels` [N, 3, S, S], read from `file` if it holds them, else computed and written there.

        The trunk must be in eval mode: batch statistics of ImageNet, not of drawings.
        """
        assert not trunk.training
        key = sha256(pixels.numpy().data, usedforsecurity=False).hexdigest() + content_hash(trunk)
        stored = read_cache(file, key)
        if stored is None:
            log.info("computing the features of %d pictures", len(pixels))
            pooled, logits = [], []
            for part in pixels.split(64):
                normal = trunk.normalise(part.float() / 255).contiguous(memory_format=torch.channels_last)
                maps = trunk.forward_map(normal)
                pooled.append(maps.mean(dim=(2, 3)).half())
                logits.append(trunk.classify(maps).half() if trunk.config.num_classes else maps.new_zeros(len(maps), 0))
            stored = {"pooled": torch.cat(pooled), "logits": torch.cat(logits)}
            write_cache(file, key, stored)
        return cls(stored["pooled"], stored["logits"])


def read_cache(file: Path, key: str) -> dict[str, Tensor] | None:
    """The tensors in `file` that were written with this `key`; None without them, or where the file is damaged."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            if (stored.metadata() or {}).get("key") != key:
                return None
            return {name: stored.get_tensor(name) for name in stored.keys()}
    except (SafetensorError, OSError) as error:
        log.warning("%s is damaged (%s); it is computed again", file, error)
        return None


def write_cache(file: Path, key: str, tensors: dict[str, Tensor]) -> None:
    """Keep tensors of a run in `file` for the next start; `key` says what they were made of."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with new_file(file) as building, disk_errors():
        save_file(tensors, building, metadata={"key": key})


class PretrainedClip(Clip):
    """CLIP's loss with texts that belong to no picture among the candidates, and a trunk held to its class logits."""

    towers: PretrainedTowers

    def __init__(
        self, towers: PretrainedTowers, config: ObjectiveConfig, frozen: Sequence[str], keep: KeepConfig, names: Tensor
    ) -> None:
        """`names` [classes, width]: the text encoder's vectors of the classes' names, or [0, width] without them."""
        super().__init__(towers, config, frozen)
        self.keep = keep
        self.register_buffer("names", names, persistent=False)

    def train(self, mode: bool = True) -> Self:
        """As in `Objective`; batch statistics stay those of ImageNet (they would follow the drawings)."""
        super().train(mode)
        for module in self.towers.trunk.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(
        self, pixels: Tensor, tokens: Any, labels: Tensor, lesson: Callable[[Towers], Tensor] | None = None
    ) -> dict[str, Tensor]:
        """As in `Objective`; `pixels` may also be pooled features [N, C].

        `tokens` hold `VECTORS` [M, width], `NEGATIVES` [K, width], `NEGATIVE_LABELS` [K], and `LOGITS` [N, classes] of
        the untouched trunk.
        """
        assert lesson is None, "the text encoder is frozen"
        towers = self.towers
        if len(self.get_buffer("names")):
            towers.name_classes(self.get_buffer("names"))
        if pixels.ndim == 2:
            images, logits = towers.combine(pixels, tokens[LOGITS].float()), tokens[LOGITS].float()
        else:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
            images, logits = towers.encode_map(towers.trunk.forward_map(pixels))
        texts = towers.encode_tokens(tokens)
        others = towers.encode_tokens({VECTORS: tokens[NEGATIVES]})
        pair = torch.arange(len(images), device=images.device) + rank() * len(images)
        ids = torch.stack([pair, labels], dim=1)
        text_ids = ids.repeat(len(texts) // len(images), 1)
        other_ids = torch.stack([torch.full_like(tokens[NEGATIVE_LABELS], NO_PAIR), tokens[NEGATIVE_LABELS]], dim=1)
        with torch.autocast(images.device.type, enabled=False):  # logits need float32
            contrast = self._contrast(images, texts, others, (ids, text_ids, other_ids))
            before = tokens[LOGITS].float().log_softmax(1)
            kept = F.kl_div(logits.log_softmax(1), before, log_target=True, reduction="batchmean")
        return {
            "loss": contrast + self.keep.logits * kept,
            "contrast": contrast.detach(),
            "kept": kept.detach(),
            "temperature": 1 / towers.scale.detach(),
        }

    def _contrast(self, images: Tensor, texts: Tensor, others: Tensor, ids: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        image_ids, text_ids, other_ids = ids
        if world_size() > 1:
            from torch.distributed.nn.functional import all_gather

            all_images, all_texts = (torch.cat(all_gather(part.contiguous())) for part in (images, texts))
        else:
            all_images, all_texts = images, texts
        scale = self.towers.scale
        candidates, candidate_ids = torch.cat([all_texts, others]), torch.cat([gather(text_ids), other_ids])
        image_loss = cross_entropy(scale * images @ candidates.T, *pairs(image_ids, candidate_ids, self.config))
        text_loss = cross_entropy(scale * texts @ all_images.T, *pairs(text_ids, gather(image_ids), self.config))
        return (image_loss + text_loss) / 2


class InheritedBatches:
    """Batches whose texts are vectors that the frozen text encoder made before: names and single keywords.

    Pictures whose English names agree are of one label, whatever set they come from.
    """

    def __init__(
        self,
        pictures: Pictures,
        features: PictureFeatures,
        vectors: TextVectors,
        settings: BatchSettings,
        with_pixels: bool = True,
    ) -> None:
        self.pixels = pictures.pixels if with_pixels else features.pooled  # what a batch holds of a picture
        self.pictures, self.features, self.vectors, self.settings = pictures, features, vectors, settings
        self.weights = pictures.weights(settings.balance)
        if settings.batch_size > len(self.weights):
            raise ConfigError(f"loop.batch_size={settings.batch_size} exceeds the {len(self.weights)} pictures")
        self.labels = torch.tensor([name_label(sample) for sample in pictures.samples])
        names: dict[tuple[str, int], None] = {}
        for sample, label in zip(pictures.samples, self.labels.tolist(), strict=True):
            names.update(dict.fromkeys((caption.name, label) for caption in sample.captions.values()))
        self.names = [name for name, _ in names]
        self.name_labels = torch.tensor([label for _, label in names])

    def __call__(self, step: int) -> Iterator[tuple[InheritedBatch, list[str]]]:
        settings = self.settings
        seed = settings.seed * 1_000_003 + step
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(self.weights, settings.batch_size, generator=generator)
        size = settings.batch_size // (settings.accumulate * replicas())
        for micro, part in enumerate(drawn[replica() :: replicas()].split(size)):
            rng = random.Random(f"{seed} {replica()} {micro}")
            samples = [self.pictures.samples[index] for index in part.tolist()]
            texts = [self._draw(sample, rng) for _ in range(settings.captions.per_picture) for sample in samples]
            others = rng.sample(range(len(self.names)), min(settings.negatives, len(self.names)))
            tokens = {
                VECTORS: self.vectors(texts),
                NEGATIVES: self.vectors([self.names[index] for index in others]),
                NEGATIVE_LABELS: self.name_labels[others],
                LOGITS: self.features.logits[part],
            }
            seed_of_pixels = rng.getrandbits(62)
            pixels = mirror(self.pixels[part], samples, settings.mirror, rng)
            batch = InheritedBatch(pixels, tokens, self.labels[part], seed_of_pixels)
            yield batch, [sample.id for sample in samples]

    def _draw(self, sample: Sample, rng: random.Random) -> str:
        caption = sample.captions[rng.choice(sorted(sample.captions))]
        if not caption.keywords or rng.random() >= self.settings.captions.keywords:
            return caption.name
        return rng.choice(caption.keywords)


def name_label(sample: Sample) -> int:
    """The label of the sample's English name; without one, of its concept."""
    english = sample.captions.get("en")
    return concept_label(f"name {english.name.casefold()}") if english else label_of(sample)


def warm_up_heads(objective: PretrainedClip, batches: InheritedBatches, steps: int, device: torch.device) -> None:
    """Train the heads alone on the untouched trunk's features, so that the trunk is not torn by random heads.

    Kumar et al. 2022 (arXiv:2202.10054): a linear probe first, then fine-tuning.
    """
    towers = objective.towers
    trained = [*towers.image_head.parameters(), *towers.text_head.parameters(), towers.logit_scale]
    optimizer = torch.optim.AdamW([p for p in trained if p.requires_grad], lr=1e-3, weight_decay=0.01)
    settings = replace(batches.settings, batch_size=min(512, len(batches.labels)), accumulate=1, mirror=0.0)
    warm = InheritedBatches(batches.pictures, batches.features, batches.vectors, settings, with_pixels=False)
    objective.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - step / steps)
        for batch, _ in warm(-1 - step):
            optimizer.zero_grad(set_to_none=True)
            objective(batch.pixels.to(device), to_device(batch.tokens, device), batch.labels.to(device))[
                "loss"
            ].backward()
            optimizer.step()
