"""Evaluates towers: recall in both directions and zero-shot classification, for each language and split.

A picture and a text match if they share a concept, so a query may have several right answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data.reading import SkipLog, expand_shards, open_shards, split_name
from data.sample import DataError, Sample
from data.styles import LANGUAGES
from retrieval.evaluation.metrics import concept_labels, ranks, recall_figures
from retrieval.evaluation.settings import RetrievalEvalConfig
from retrieval.towers.base import Towers, unit

if TYPE_CHECKING:
    from rich.table import Table

# prompts around a class name, whose features are averaged as in CLIP (Radford et al. 2021, section 3.1.4)
CONCEPT_TEMPLATES: dict[str, tuple[str, ...]] = {
    "zh": ("{}", "{}的表情符号", "一张{}的图片"),
    "en": ("{}", "an emoji of {}", "a picture of {}"),
    "fr": ("{}", "un émoji : {}", "une image de {}"),
    "de": ("{}", "ein Emoji: {}", "ein Bild: {}"),
    "cs": ("{}", "emoji: {}", "obrázek: {}"),
    "ja": ("{}", "{}の絵文字", "{}の画像"),
    "ko": ("{}", "{} 이모지", "{} 그림"),
}
FAMILY_TEMPLATES: dict[str, tuple[str, ...]] = {
    "zh": ("{} 风格", "{} 风格的表情符号"),
    "en": ("{} style", "an emoji, {} style"),
    "fr": ("style {}", "un émoji, style {}"),
    "de": ("{} Stil", "ein Emoji, {} Stil"),
    "cs": ("styl {}", "emoji, styl {}"),
    "ja": ("{} スタイル", "絵文字, {} スタイル"),
    "ko": ("{} 스타일", "이모지, {} 스타일"),
}
TOP_AT = (1, 5)


def held_out_splits(shards: Path | str) -> list[str]:
    """The splits of a folder other than "train", or all if there is no other. Raises `DataError` without shards."""
    splits = sorted({split_name(shard) for shard in expand_shards(shards)})
    return [split for split in splits if split != "train"] or splits


def evaluate(
    towers: Towers, shards: Path | str, config: RetrievalEvalConfig, *, progress: bool = False
) -> dict[str, Any]:
    """Figures of each split, ready for JSON (see `evaluate_split`).

    Raises `DataError` if a split is missing or holds no readable picture.
    """
    from tqdm import tqdm

    measured = {}
    for split in config.splits:
        log = SkipLog()
        examples = islice(open_shards(shards, split, log=log), config.limit)
        samples, features = encode_samples(towers, tqdm(examples, desc=split, disable=not progress), config.batch_size)
        if not samples:
            raise DataError(f"{shards} holds no readable picture in the split {split}")
        measured[split] = evaluate_split(towers, samples, features, seed=config.seed) | {"skipped": log.counts}
    return {"kind": towers.kind, "embed_dim": towers.embed_dim, "splits": measured}


def encode_samples(towers: Towers, examples: Iterable[Any], batch_size: int = 64) -> tuple[list[Sample], Tensor]:
    """The samples of `Example`s, and the features of their pictures [N, D]."""
    samples: list[Sample] = []
    features = [torch.zeros(0, towers.embed_dim)]
    examples = iter(examples)
    while batch := list(islice(examples, batch_size)):
        samples += [sample for sample, _ in batch]
        features.append(towers.encode_image([image for _, image in batch]))
    return samples, torch.cat(features)


def concept_of(sample: Sample) -> str:
    """The concept by which samples match each other; a sample without one is a concept of its own."""
    return sample.concept or f"id:{sample.id}"


def evaluate_split(towers: Towers, samples: Sequence[Sample], images: Tensor, *, seed: int = 0) -> dict[str, Any]:
    """Figures for picture features `images` [N, D] against captions, for each language and as means over languages.

    `text_to_image` ranks all N pictures for the caption of each sample, `image_to_text` all distinct (concept, caption)
    of the language for each picture. `shuffled` repeats both with permuted concepts of the queries, which gives the
    level of chance. `zero_shot` classifies each picture by concept, and by family if there are several.
    """
    concepts = [concept_of(sample) for sample in samples]
    labels = concept_labels(concepts)
    families = [sample.family or "none" for sample in samples]
    spoken = {language for sample in samples for language in sample.captions}
    languages: dict[str, Any] = {}
    for language in sorted(spoken, key=lambda name: (name not in LANGUAGES, (*LANGUAGES, name).index(name))):
        own = torch.tensor([row for row, sample in enumerate(samples) if language in sample.captions])
        pairs = [(concepts[row], samples[row].captions[language].name) for row in own.tolist()]
        distinct = list(dict.fromkeys(pairs))
        features = towers.encode_text([name for _, name in distinct])
        row_of = {pair: row for row, pair in enumerate(distinct)}
        texts = features[[row_of[pair] for pair in pairs]]
        text_labels = concept_labels(concept for concept, _ in distinct)
        shuffled = own[torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))]
        ways = [
            {
                "text_to_image": recall_figures(ranks(texts, images, labels[wanted], labels)),
                "image_to_text": recall_figures(ranks(images[own], features, labels[wanted], text_labels)),
            }
            for wanted in (own, shuffled)
        ]
        classes = {"concept": (pairs, CONCEPT_TEMPLATES)}
        if len(set(families)) > 1:
            classes["family"] = [(families[row], families[row]) for row in own.tolist()], FAMILY_TEMPLATES
        zero_shot = {
            kind: classify(towers, images[own], named, templates.get(language, ("{}",)))
            for kind, (named, templates) in classes.items()
        }
        languages[language] = {**ways[0], "shuffled": ways[1], "zero_shot": zero_shot}
    return {
        "pictures": len(samples),
        "concepts": len(set(concepts)),
        "languages": languages,
        "mean": _mean(list(languages.values())),
    }


def classify(
    towers: Towers, images: Tensor, classes: Sequence[tuple[str, str]], templates: Sequence[str]
) -> dict[str, float]:
    """Zero-shot accuracy of picture features [N, D]; `classes` are the class of each picture and a name for it.

    A class is represented by the mean over `templates` of its first name. Returns `top@k` and the number of `classes`.
    """
    names: dict[str, str] = {}
    for key, name in classes:
        names.setdefault(key, name)
    prompts = [template.format(name) for name in names.values() for template in templates]
    features = unit(towers.encode_text(prompts).unflatten(0, (len(names), len(templates))).mean(dim=1))
    positions = ranks(images, features, concept_labels(key for key, _ in classes), concept_labels(names))
    return {f"top@{k}": float((positions <= k).double().mean()) for k in TOP_AT} | {"classes": float(len(names))}


def _mean(figures: Sequence[Any]) -> Any:
    """The mean of nested dictionaries of numbers."""
    if isinstance(figures[0], dict):
        return {name: _mean([figure[name] for figure in figures]) for name in figures[0]}
    return sum(figures) / len(figures)


def format_retrieval_table(record: dict[str, Any]) -> Table:
    """The figures of `evaluate` as a table with a row for each language, in per cent."""
    from rich.table import Table

    table = Table(title="recall at 1, 5, 10 and zero-shot accuracy in %; chance: recall at 10 with shuffled concepts")
    names = ("split", "language", "text to image", "median", "image to text", "median", "concept", "family", "chance")
    for name in names:
        table.add_column(name, justify="left" if name in ("split", "language") else "right")
    for split, measured in record["splits"].items():
        for language, figures in [*measured["languages"].items(), ("mean", measured["mean"])]:
            cells = []
            for way in ("text_to_image", "image_to_text"):
                cells.append(" ".join(f"{100 * figures[way][f'recall@{k}']:5.1f}" for k in (1, 5, 10)))
                cells.append(f"{figures[way]['median_rank']:.0f}")
            top = {kind: f"{100 * named['top@1']:.1f}" for kind, named in figures["zero_shot"].items()}
            cells += [top["concept"], top.get("family", "-")]
            cells.append(f"{100 * figures['shuffled']['text_to_image']['recall@10']:.1f}")
            table.add_row(split, language, *cells, end_section=language == "mean")
    return table


def plot_recall(record: dict[str, Any], path: Path) -> None:
    """Plot recall at 10 from the figures of `evaluate` as a PNG, with a panel for each split."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(record["splits"]), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(record["splits"]), squeeze=False)[0]
    for panel, (split, measured) in zip(panels, record["splits"].items(), strict=True):
        languages = measured["languages"]
        for k, (way, name) in enumerate((("text_to_image", "text to image"), ("image_to_text", "image to text"))):
            heights = [figures[way]["recall@10"] for figures in languages.values()]
            panel.bar([x + 0.4 * k for x in range(len(languages))], heights, 0.4, label=name)
        chance = [figures["shuffled"]["text_to_image"]["recall@10"] for figures in languages.values()]
        panel.plot([x + 0.2 for x in range(len(languages))], chance, "k_", markersize=20, label="shuffled concepts")
        panel.set_xticks([x + 0.2 for x in range(len(languages))], list(languages))
        panel.set_title(f"{split}: {measured['pictures']} pictures, {measured['concepts']} concepts")
        panel.set_ylabel("recall at 10")
        panel.set_ylim(0, 1)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)
