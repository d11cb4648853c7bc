"""Evaluates a generator by towers: how well its pictures show their prompts, and whether they copy training data."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from data.images import open_image, to_square
from data.reading import Example, open_shards
from data.sample import DataError, Sample
from data.styles import LANGUAGES, with_style
from mmwudao.evaluation_settings import GeneratorEvalConfig
from mmwudao.pipeline import MAX_PICTURES, Pipeline
from retrieval.evaluation.evaluate import concept_of
from retrieval.towers.base import Towers

if TYPE_CHECKING:
    from rich.table import Table

THUMBNAIL = 64  # px
BATCH = 64


@dataclass(frozen=True)
class Neighbour:
    """An encoded training picture, and its cosine similarity to a drawn one."""

    similarity: float
    id: str
    image: bytes


def evaluate_generator(
    pipe: Pipeline, towers: Towers, shards: Path | str, config: GeneratorEvalConfig, *, progress: bool = False
) -> tuple[dict[str, Any], Image.Image]:
    """Measure a generator: figures ready for JSON, and the sheet of nearest training pictures (`neighbour_sheet`).

    R-precision as in AttnGAN (Xu et al. 2018, section 4.1): how often the towers rank a picture's own caption first
    among `candidates`, the others being of other concepts, for each language. `drawn`: one picture of each prompt, in
    the family of the held-out picture. `real`: the held-out pictures themselves. `random`: pictures drawn for other
    prompts. `nearest`: the cosine similarity of drawn pictures to their nearest training picture, and for comparison
    that of the held-out pictures, which cannot be copies.

    Raises `DataError` if the split has too few concepts, or no training picture can be read.
    """
    chosen, samples = choose_held_out(shards, config, pipe.config.styles)
    languages = [name for name in LANGUAGES if all(name in sample.captions for sample, _ in chosen)]
    if not languages:
        raise DataError(f"no language has a caption for each of the {len(chosen)} prompts of {config.split}")
    pictured = [sample for sample, _ in chosen]
    texts = {language: candidate_texts(pictured, samples, language, config) for language in languages}
    prompts = [prompt_of(sample, language, pipe.config.styles) for language in languages for sample in pictured]
    drawn = _draw(pipe, prompts, config.seed, progress)
    drawn_features = towers.encode_image(drawn)
    real_features = towers.encode_image([image for _, image in chosen])
    figures = {
        language: {
            "drawn": r_precision(towers, own, texts[language]),
            "real": r_precision(towers, real_features, texts[language]),
            "random": r_precision(towers, own.roll(1, dims=0), texts[language]),
        }
        for language, own in zip(languages, drawn_features.split(len(chosen)), strict=True)
    }
    queries = torch.cat([drawn_features, real_features])
    nearest = _nearest_in_training(towers, queries, shards, config, progress)
    similarity = [entries[0].similarity for entries in nearest]
    record = {
        **asdict(config),
        "model_hash": pipe.config.model_hash,
        "selection": asdict(pipe.config.selection),
        "chance": 1 / config.candidates,
        "r_precision": figures,
        "mean": {name: sum(f[name] for f in figures.values()) / len(figures) for name in ("drawn", "real", "random")},
        "nearest": {"drawn": _spread(similarity[: len(drawn)]), "real": _spread(similarity[len(drawn) :])},
        "pictures": [
            {"prompt": prompt, "sample": sample.id, "nearest": near[0].id, "similarity": near[0].similarity}
            for prompt, sample, near in zip(prompts, pictured * len(languages), nearest[: len(drawn)], strict=True)
        ],
    }
    return record, neighbour_sheet(drawn, nearest[: len(drawn)], columns=len(languages))


def prompt_of(sample: Sample, language: str, styles: Sequence[str]) -> str:
    """The sample's name in `language`, with its family if the model can draw it."""
    name = sample.captions[language].name
    return with_style(name, sample.family, language) if sample.family and sample.family in styles else name


def _draw(pipe: Pipeline, prompts: list[str], seed: int, progress: bool) -> list[Image.Image]:
    from tqdm import tqdm

    size = MAX_PICTURES // pipe.config.selection.candidates  # prompts of a call
    images = []
    for start in range(0, len(prompts), size):
        with tqdm(desc="drawing", disable=not progress) as bar:

            def on_progress(step: Any, bar: Any = bar) -> None:
                bar.total = step.total
                bar.update(step.done - bar.n)

            first = seed + start * pipe.config.selection.candidates
            images += pipe.generate(prompts[start : start + size], seed=first, on_progress=on_progress)
    return images


def _nearest_in_training(
    towers: Towers, queries: Tensor, shards: Path | str, config: GeneratorEvalConfig, progress: bool
) -> list[list[Neighbour]]:
    from tqdm import tqdm

    train = islice(open_shards(shards, "train"), config.train_limit)
    return nearest_pictures(
        towers, queries, tqdm(train, desc="training pictures", disable=not progress), config.neighbours
    )


def choose_held_out(
    shards: Path | str, config: GeneratorEvalConfig, styles: Sequence[str]
) -> tuple[list[Example], list[Sample]]:
    """The held-out pictures whose captions become prompts, one a base concept, and all samples of the split."""
    chosen: dict[str, Example] = {}
    samples = []
    for example in open_shards(shards, config.split):
        sample = example.sample
        samples.append(sample)
        # a picture of a family that the model cannot draw would be an unfair comparison
        if len(chosen) < config.prompts and (not styles or sample.family in styles):
            chosen.setdefault(sample.base_concept or concept_of(sample), example)
    if len(chosen) < 2:
        raise DataError(f"{shards} has {len(chosen)} concepts to draw in {config.split}; at least 2 are needed")
    return list(chosen.values()), samples


def candidate_texts(
    chosen: Sequence[Sample], samples: Sequence[Sample], language: str, config: GeneratorEvalConfig
) -> list[list[str]]:
    """For each sample its caption, followed by `candidates - 1` distinct random captions of other concepts.

    Raises `DataError` if the split has too few.
    """
    named = {(concept_of(sample), sample.captions[language].name) for sample in samples if language in sample.captions}
    rows = []
    for k, sample in enumerate(chosen):
        own = {name for concept, name in named if concept == concept_of(sample)}
        others = sorted({name for _, name in named} - own)
        if len(others) < config.candidates - 1:
            most = len(others) + 1
            raise DataError(f"{language} has only {most - 1} wrong captions: ask for {most} candidates or fewer")
        draw = random.Random(f"{config.seed} {k}").sample(others, config.candidates - 1)
        rows.append([sample.captions[language].name, *draw])
    return rows


def r_precision(towers: Towers, images: Tensor, texts: Sequence[Sequence[str]]) -> float:
    """The share of `images` [N, D] whose first text is the nearest of their texts; a tie counts as a miss."""
    distinct = {text: k for k, text in enumerate(dict.fromkeys(text for row in texts for text in row))}
    features = towers.encode_text(list(distinct))
    hits = 0
    for image, row in zip(images, texts, strict=True):
        scores = features[[distinct[text] for text in row]] @ image
        hits += int(scores[0] > scores[1:].max())
    return hits / len(texts)


def nearest_pictures(
    towers: Towers, queries: Tensor, examples: Iterable[Example], count: int
) -> list[list[Neighbour]]:
    """The `count` nearest of `examples` to each of `queries` [Q, D], nearest first, in one pass with little memory.

    Raises `DataError` if there is no example.
    """
    best: list[list[Neighbour]] = [[] for _ in queries]
    examples = iter(examples)
    while batch := list(islice(examples, BATCH)):
        scores = queries @ towers.encode_image([image for _, image in batch]).T
        values, indices = scores.topk(min(count, len(batch)), dim=1)
        for kept, row, columns in zip(best, values.tolist(), indices.tolist(), strict=True):
            samples = [batch[k].sample for k in columns]
            new = [Neighbour(v, one.id, one.require_image()) for v, one in zip(row, samples, strict=True)]
            kept[:] = heapq.nlargest(count, [*kept, *new], key=lambda neighbour: neighbour.similarity)
    if queries.shape[0] and not best[0]:
        raise DataError("no training picture can be read")
    return best


def neighbour_sheet(drawn: Sequence[Image.Image], nearest: Sequence[Sequence[Neighbour]], columns: int) -> Image.Image:
    """Each drawn picture with its nearest training pictures to its right; each language has a block of rows."""
    rows = -(-len(drawn) // columns)
    width = (1 + max(len(entries) for entries in nearest)) * THUMBNAIL
    gap = THUMBNAIL // 8
    sheet = Image.new("RGB", (columns * (width + 2 * gap) - gap, rows * THUMBNAIL), "white")
    for k, (picture, entries) in enumerate(zip(drawn, nearest, strict=True)):
        left, top = k // rows * (width + 2 * gap), k % rows * THUMBNAIL
        sheet.paste(to_square(picture, THUMBNAIL), (left, top))
        for column, entry in enumerate(entries, start=1):
            sheet.paste(to_square(open_image(entry.image), THUMBNAIL), (left + gap + column * THUMBNAIL, top))
    return sheet


def _spread(values: Sequence[float]) -> dict[str, float]:
    ordered = torch.tensor(values, dtype=torch.float64)
    return {
        "median": float(ordered.quantile(0.5)),
        "95%": float(ordered.quantile(0.95)),
        "largest": float(ordered.max()),
    }


def format_generator_table(record: dict[str, Any]) -> Table:
    """The figures of `evaluate_generator` as a table with a row for each language."""
    from rich.table import Table

    near = record["nearest"]
    table = Table(
        title=f"R-precision in % among {record['candidates']} captions",
        min_width=100,  # room for the caption
        caption="cosine similarity to the nearest training picture, median and largest: "
        + ", ".join(f"{name} {near[name]['median']:.3f} {near[name]['largest']:.3f}" for name in ("drawn", "real")),
    )
    for name in ("language", "drawn", "real", "random"):
        table.add_column(name, justify="left" if name == "language" else "right")
    for language, figures in [*record["r_precision"].items(), ("mean", record["mean"])]:
        table.add_row(language, *(f"{100 * figures[name]:.1f}" for name in ("drawn", "real", "random")))
    return table
