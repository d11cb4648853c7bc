"""Planted faults against the filters of `mmwudao data clean`: how many each finds, and how much it takes wrongly.

    python -m bench.quality.clean_faults --shards shards/emoji --limit 1500 --towers emoji

Samples of the training split, chosen by hash, are the good ones. Into them are planted: copies of pictures (encoded
again, resized, cropped by 5 %, recoloured), captions under another language's tag, captions of another picture,
telephone numbers, mail addresses and identity numbers in seven languages, and listed words. Recall is the share of
planted faults that go; a false removal is a text or picture of the good samples that goes.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from PIL import Image, ImageEnhance

from data.clean.config import CleanConfig, text_filters
from data.clean.fit import FitScore, worst_fits
from data.clean.words import LISTED_WORDS
from data.fingerprints import Fingerprints, Named, fingerprint, near_pairs, stacked
from data.images import open_image
from data.reading import expand_shards, read_shard
from data.recipes.npm import default_cache, fetch_package, read_json
from data.recipes.splits import stable_hash
from data.sample import Sample
from data.settings import NearSettings
from data.styles import LANGUAGES

PERSONAL = {
    "zh": ["电话 138-0013-8000", "手机13912345678", "邮箱 wang@example.cn", "身份证 11010519491231002X"],
    "en": ["call +1 650-253-0000", "phone (212) 555-0143 today", "mail jane.doe@example.com", "call 020 7946 0018"],
    "fr": ["appelez le 01 42 68 53 00", "tél. +33 6 12 34 56 78", "écrire à marie@exemple.fr"],
    "de": ["Tel. 030 901820", "ruf +49 151 23456789 an", "Post an max@beispiel.de"],
    "cs": ["volejte 224 171 111", "tel. +420 601 123 456", "pište na jan@priklad.cz"],
    "ja": ["電話 03-3211-1111", "携帯 090-1234-5678", "メール taro@example.jp"],
    "ko": ["전화 02-731-2114", "휴대폰 010-1234-5678", "메일 kim@example.kr"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--limit", type=int, default=1500)
    parser.add_argument("--towers", help="towers or a model, for captions that do not fit")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    samples = good_samples(options.shards, options.limit)
    print(f"{len(samples)} good samples of {options.shards}")
    report = {
        **measure_texts(samples, rng),
        **measure_pictures(samples, rng),
    }
    if options.towers:
        from mmwudao.loading.towers import load_model_towers
        from mmwudao.tower_scores import fit_score

        report |= measure_fit(samples, fit_score(load_model_towers(options.towers)), rng)
    for name, figures in report.items():
        print(f"{name:<34}" + ", ".join(f"{key} {value}" for key, value in figures.items()))
    print(json.dumps(report, ensure_ascii=False))


def good_samples(shards: str, limit: int) -> list[Sample]:
    """The first `limit` training samples by hash."""
    found = [sample for shard in expand_shards(shards, "train") for sample in read_shard(shard, lambda *skip: None)]
    return sorted(found, key=lambda sample: stable_hash(sample.id))[:limit]


def _share(count: int, total: int) -> str:
    return f"{count / max(1, total):.3f} ({count}/{total})"


def measure_texts(samples: list[Sample], rng: random.Random) -> dict[str, dict[str, object]]:
    """Recall and false removals of the filters of texts, on names and keywords joined: emoji names are short."""
    config = CleanConfig()
    language, _, privacy, words = text_filters(config)
    texts = [
        (", ".join((caption.name, *caption.keywords)), tag)
        for sample in samples
        for tag, caption in sorted(sample.captions.items())
    ]
    texts = rng.sample(texts, min(len(texts), 4000))
    listed = read_json(fetch_package(LISTED_WORDS, default_cache()), [f"{tag}.json" for tag in LANGUAGES])
    planted: dict[str, list[tuple[str, str]]] = {
        "language": [(text, rng.choice([other for other in LANGUAGES if other != tag])) for text, tag in texts],
        "privacy": [(f"{text[:30]} {rng.choice(PERSONAL[tag])}", tag) for text, tag in texts],
        "words": [
            (f"{text[:30]} {rng.choice([w for w in listed[f'{tag}.json'] if len(w) > 1])}", tag) for text, tag in texts
        ],
    }
    report: dict[str, dict[str, object]] = {}
    for name, one in (("language", language), ("privacy", privacy), ("words", words)):
        start = time.perf_counter()
        wrong = Counter(tag for text, tag in texts if one.judge(text, tag) is None)
        seconds = time.perf_counter() - start
        found = [(text, tag) for text, tag in planted[name] if one.judge(text, tag) is None]
        missed = Counter(tag for _, tag in planted[name]) - Counter(tag for _, tag in found)
        report[name] = {
            "recall": _share(len(found), len(texts)),
            "false": _share(wrong.total(), len(texts)),
            "false by language": dict(wrong),
            "missed by language": dict(missed),
            "texts/s": round(len(texts) / seconds),
        }
    for least in (10, 20, 40):
        long = [number for number, (text, _) in enumerate(texts) if len(text) >= least]
        found_long = sum(language.judge(*planted["language"][number]) is None for number in long)
        wrong_long = sum(language.judge(*texts[number]) is None for number in long)
        report[f"language, {least} characters or more"] = {
            "recall": _share(found_long, len(long)), "false": _share(wrong_long, len(long)),
        }  # fmt: skip
    return report


def _encoded_again(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=60)
    return open_image(file.getvalue())


def _cropped(image: Image.Image) -> Image.Image:
    edge = image.width // 20
    return image.crop((edge, edge, image.width - edge, image.height - edge)).resize(image.size)


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG 60": _encoded_again,
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS),
    "cropped by 5 %": _cropped,
    "recoloured by 20 %": lambda image: ImageEnhance.Color(image).enhance(0.8),
    "brighter by 10 %": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
}


def measure_pictures(samples: list[Sample], rng: random.Random) -> dict[str, dict[str, object]]:
    """Recall of copies of each kind, and how many good pictures are near another good one, by settings."""
    start = time.perf_counter()
    pictures = [open_image(sample.require_image()) for sample in samples]
    good = _fingerprints(samples, pictures)
    seconds = time.perf_counter() - start
    chosen = rng.sample(range(len(samples)), min(300, len(samples)))
    copies = {
        kind: _fingerprints([samples[number] for number in chosen], [change(pictures[number]) for number in chosen])
        for kind, change in COPIES.items()
    }
    report: dict[str, dict[str, object]] = {}
    for distance, colour in ((2, 0.03), (4, 0.03), (6, 0.06), (10, 0.1)):
        settings = NearSettings(distance=distance, colour=colour)
        figures: dict[str, object] = {}
        for kind, prints in copies.items():
            found = {query for query, other, _, _ in near_pairs(prints, good, settings) if other == chosen[query]}
            figures[kind] = _share(len(found), len(chosen))
        pairs = [(a, b) for a, b, _, _ in near_pairs(good, good, settings) if a < b]
        figures["good pairs"] = len(pairs)
        figures["of them with one name"] = sum(
            samples[a].captions["en"].name == samples[b].captions["en"].name for a, b in pairs
        )
        report[f"near pictures, {distance} bits, {colour}"] = figures
    report["near pictures"] = {"pictures/s": round(len(samples) / seconds)}
    return report


def _fingerprints(samples: list[Sample], pictures: list[Image.Image]) -> Fingerprints:
    names = [Named(sample.id, "train", sample.family or "", "") for sample in samples]
    return stacked(names, [fingerprint(picture) for picture in pictures])


def measure_fit(samples: list[Sample], score: FitScore, rng: random.Random) -> dict[str, dict[str, object]]:
    """Recall of captions of another concept in one sample of fifty, when the lowest share goes."""
    swapped = set(rng.sample(range(len(samples)), max(1, len(samples) // 50)))
    mixed = []
    for number, sample in enumerate(samples):
        other = rng.choice([one for one in samples if one.base_concept != sample.base_concept])
        mixed.append(replace(sample, captions=other.captions) if number in swapped else sample)
    cosines: list[tuple[str, float]] = []
    start = time.perf_counter()
    for first in range(0, len(mixed), 32):
        batch = mixed[first : first + 32]
        pictures = [open_image(sample.require_image()) for sample in batch]
        values = score(pictures, [sample.captions["en"].name for sample in batch])
        cosines += [("en", float(value)) for value in np.asarray(values)]
    seconds = time.perf_counter() - start
    report: dict[str, dict[str, object]] = {}
    for share in (0.02, 0.05):
        worst = worst_fits(cosines, share)
        report[f"fit, lowest {share:.0%} go"] = {
            "recall": _share(len(worst & swapped), len(swapped)),
            "false": _share(len(worst - swapped), len(samples) - len(swapped)),
            "pictures/s": round(len(samples) / seconds),
        }
    return report


if __name__ == "__main__":
    main()
