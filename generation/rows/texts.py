"""What a training row says about a picture: a caption drawn by chance, or its names in every language."""

from __future__ import annotations

import random
from dataclasses import dataclass

from data.options import check_options, option
from data.sample import Sample
from data.styles import draw_text, tagged, with_style


@dataclass
class CaptionMix:
    """How a caption is drawn: a language, then the name, some keywords or both, then perhaps the style.

    The rest of `name` + `keywords` to 1 is the probability of the name followed by some keywords.
    """

    name: float = option(0.6, "Probability that a caption is the name alone.", least=0, most=1)
    keywords: float = option(0.2, "Probability that a caption is some keywords in random order.", least=0, most=1)
    style: float = option(0.5, "Probability that a caption names the family of its picture.", least=0, most=1)
    dropout: float = option(
        0.1, "Probability of no caption, which classifier-free guidance needs (Ho and Salimans 2022).", least=0, most=1
    )
    second: float = option(0.0, "Probability that a caption continues in a second language.", least=0, most=1)

    def __post_init__(self) -> None:
        check_options(self)
        if self.name + self.keywords > 1:
            raise ValueError("captions.name + captions.keywords must not exceed 1")


@dataclass(frozen=True)
class DrawnCaption:
    """What a row says, and the name of the picture in the caption's (first) language; both are empty for no caption."""

    text: str = ""
    name: str = ""


def draw_caption(sample: Sample, mix: CaptionMix, rng: random.Random) -> DrawnCaption:
    """A caption of `sample` as `mix` says; an empty one for caption dropout and for a sample without captions."""
    if rng.random() < mix.dropout or not sample.captions:
        return DrawnCaption()
    language = rng.choice(sorted(sample.captions))
    text = draw_text(sample.captions[language], mix.name, mix.keywords, rng)
    if mix.second and rng.random() < mix.second:
        other = rng.choice(sorted(sample.captions))
        text += ", " + draw_text(sample.captions[other], mix.name, mix.keywords, rng)
    if sample.family and rng.random() < mix.style:
        text = with_style(text, sample.family, language)
    return DrawnCaption(text, sample.captions[language].name)


def descriptions(sample: Sample) -> list[str]:
    """The names of `sample`, each behind its language as in "en: red heart"; the order is that of the languages."""
    return [tagged(sample.captions[language].name, language) for language in sorted(sample.captions)]
