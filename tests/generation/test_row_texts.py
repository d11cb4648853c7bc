"""The captions of training rows."""

import random
from collections import Counter

import pytest

from data.sample import Caption, Sample
from data.styles import LANGUAGES, STYLE_PHRASES
from generation.rows.texts import CaptionMix, draw_caption
from tests.helpers.tiny_codes import sample


def draws(config: CaptionMix, item: Sample, count: int = 4000) -> list[str]:
    return [draw_caption(item, config, random.Random(index)).text for index in range(count)]


def test_captions_are_drawn_with_the_given_probabilities():
    item = Sample("a", b"", "png", {"en": Caption("name", ("k1", "k2", "k3", "k4", "k5", "k6"))}, family="noto")
    found = draws(CaptionMix(name=0.5, keywords=0.3, style=0.25, dropout=0.2), item)
    share: Counter[str] = Counter()
    for caption in found:
        share["dropout"] += not caption
        share["style"] += caption.endswith(", noto style")
        plain = caption.removesuffix(", noto style")
        share["name"] += plain == "name"
        share["keywords"] += plain.startswith("k")
        share["both"] += plain.startswith("name, k")
        words = [word for word in plain.split(", ") if word.startswith("k")]
        assert len(words) == len(set(words)) <= 4
    expected = {"dropout": 0.2, "style": 0.8 * 0.25, "name": 0.8 * 0.5, "keywords": 0.8 * 0.3, "both": 0.8 * 0.2}
    for kind, probability in expected.items():
        assert share[kind] / len(found) == pytest.approx(probability, abs=0.03), kind
    assert share["dropout"] + share["name"] + share["keywords"] + share["both"] == len(found)


def test_languages_are_drawn_evenly():
    item = Sample("a", b"", "png", {language: Caption(language) for language in LANGUAGES})
    share = Counter(draws(CaptionMix(dropout=0.0), item))
    assert set(share) == set(LANGUAGES)
    assert all(count / 4000 == pytest.approx(1 / 7, abs=0.03) for count in share.values())


def test_keywords_change_order():
    item = Sample("a", b"", "png", {"en": Caption("name", ("k1", "k2"))})
    assert set(draws(CaptionMix(name=0, keywords=1, dropout=0), item)) == {"k1", "k2", "k1, k2", "k2, k1"}


def test_a_caption_without_keywords_is_the_name():
    item = Sample("a", b"", "png", {"en": Caption("name")})
    assert set(draws(CaptionMix(name=0, keywords=1, dropout=0), item)) == {"name"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_style_is_named_in_the_language_of_the_caption(language):
    item = Sample("a", b"", "png", {language: Caption("X")}, family="fluent-emoji")
    (found,) = set(draws(CaptionMix(name=1, keywords=0, style=1, dropout=0), item, 20))
    assert found == STYLE_PHRASES[language].format(caption="X", family="fluent-emoji")
    item.family = None
    assert set(draws(CaptionMix(name=1, keywords=0, style=1, dropout=0), item, 20)) == {"X"}


def test_a_caption_depends_on_the_generator_alone():
    config = CaptionMix()
    assert draws(config, sample(1), 50) == draws(config, sample(1), 50)
    assert len(set(draws(config, sample(1), 50))) > 10


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"name": 1.1}, "name must be a number from 0 to 1"),
        ({"dropout": -0.1}, "dropout must be"),
        ({"name": 0.7, "keywords": 0.4}, "must not exceed 1"),
    ],
)
def test_impossible_probabilities(change, problem):
    with pytest.raises(ValueError, match=problem):
        CaptionMix(**change)
