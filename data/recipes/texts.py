"""Short texts in seven languages, one a line: what a small text encoder is distilled from.

Words and names come from packages of the npm and Python registries at pinned versions (`text_sources`), and
descriptions of pictures are put together from them (`text_phrases`). Two builds are byte-identical.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from data.atomic import write_file
from data.reading import expand_shards, read_entries
from data.recipes.concepts import fetch_concepts
from data.recipes.flags import COUNTRIES, country_names
from data.recipes.npm import default_cache, fetch_package, read_json
from data.recipes.settings import TextSettings
from data.recipes.splits import split_of, stable_hash
from data.recipes.text_phrases import PHRASES, draw_phrase
from data.recipes.text_sources import (
    Noun,
    WordList,
    read_cities,
    read_dictionaries,
    read_map_terms,
    read_places,
)
from data.sample import DataError, Sample
from data.styles import LANGUAGES

TEXTS = 200_000  # of all seven languages; a text that two of them have is written once
_ENGLISH = 0.25  # of them; the other languages have equal shares
# of a language's texts; names and nouns are what these leave
_PHRASES, _DEFINITIONS, _WORDS = 0.36, 0.08, 0.1
_PICTURED = 4000  # the common nouns that phrases are made of
_MOST_CHARACTERS = 60
# what a whole text consists of
_CHINESE = re.compile(r"[\u3400-\u9fff，、]+")
_JAPANESE = re.compile(r"[\u3041-\u3096\u30a1-\u30faー々\u3400-\u9fff・、]+")
_KOREAN = re.compile(r"[\uac00-\ud7a3 ,]+")
_LATIN = re.compile(r"[^\W\d_](?:[^\W\d_]|[ ,:’'-])*[^\W\d_]")
_LETTERS = {"zh": _CHINESE, "ja": _JAPANESE, "ko": _KOREAN}
_SKIN_TONES = re.compile("[\U0001f3fb-\U0001f3ff]")


def build_texts(out: Path, settings: TextSettings | None = None) -> dict[str, int]:
    """Write the texts into the file `out`, in an order by hash; returns how many there are of each language.

    Raises `DataError` for an existing `out`, a missing npm client, a changed package, or shards that cannot be read.
    """
    out, settings = Path(out), settings or TextSettings()
    if out.exists():
        raise DataError(f"{out} exists: choose another file")
    wanted = settings.languages.split(",")
    chosen = [language for language in LANGUAGES if language in wanted]
    captions = _caption_texts(settings.shards)  # before the packages are fetched: a wrong path is told at once
    languages: dict[str, str] = {}
    for language, listed in read_word_lists(chosen, settings.cache).items():
        share = _ENGLISH if language == "en" else (1 - _ENGLISH) / (len(LANGUAGES) - 1)
        listed.names[:0] = captions.get(language, [])
        for text in choose_texts(listed, language, round(share * TEXTS)):
            languages.setdefault(text, language)
    texts = sorted(languages, key=stable_hash)[: settings.limit]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, "".join(f"{text}\n" for text in texts).encode())
    counts = dict.fromkeys(chosen, 0)
    for text in texts:
        counts[languages[text]] += 1
    return counts


def read_word_lists(languages: list[str], cache: Path | None = None) -> dict[str, WordList]:
    """What each language has, from the pinned packages, which are fetched if they are not there yet.

    Names: emoji but for those held out as concepts and those with a skin tone, countries, languages, cities, and what
    there is on maps.
    """
    lists = read_dictionaries(languages, cache)
    packages = cache or default_cache()
    concepts = fetch_concepts(packages)
    countries = read_json(fetch_package(COUNTRIES, packages), ["countries.json"])["countries.json"]
    national = country_names(countries, concepts)
    places, cities = read_places(packages, languages), read_cities(packages, languages)
    terms = read_map_terms(packages, languages)
    kept = [concept for concept in concepts.values() if split_of(concept.base, "") != "test-concept"]
    for language, listed in lists.items():
        captions = [concept.captions[language] for concept in kept if not _SKIN_TONES.search(concept.emoji)]
        on_maps, other_terms = terms[language]
        listed.things = [*(caption.name for caption in captions if ":" not in caption.name), *on_maps]
        listed.names = [
            *(caption.name for caption in captions),
            *(keyword for caption in captions for keyword in caption.keywords),
            *(name for country in sorted(national) for name in national[country][language]),
            *other_terms,
            *places[language],
            *cities[language],
        ]
    return lists


def choose_texts(listed: WordList, language: str, count: int) -> list[str]:
    """Up to `count` clean texts: things and names, then words and definitions in their shares, nouns, and phrases."""
    chosen = dict.fromkeys(_clean([*listed.things, *listed.names], language))
    nouns = [noun for noun in listed.nouns if clean_text(noun.name, language) == noun.name]
    words = list(_clean(listed.words, language))[: round(_WORDS * count)]
    definitions = list(_clean(listed.definitions, language))[: round(_DEFINITIONS * count)]
    single = count - round(_PHRASES * count)
    for text in [*words, *definitions, *(noun.name for noun in nouns)]:
        if len(chosen) >= single:
            break
        chosen.setdefault(text)
    pools = _pictured(nouns, list(dict.fromkeys(_clean(listed.things, language))), language)
    rng = random.Random(f"phrases {language}")
    for _ in range(10 * count if pools else 0):  # few nouns make fewer phrases than are wanted
        if len(chosen) >= count:
            break
        text = draw_phrase(PHRASES[language], pools, rng)
        if len(text) <= _MOST_CHARACTERS:
            chosen.setdefault(text)
    return list(chosen)[:count]


def clean_text(text: str, language: str) -> str:
    """The text in NFC without stray spaces; empty where it has other signs than a name in that language has."""
    text = " ".join(unicodedata.normalize("NFC", text).split())
    letters = _LETTERS.get(language, _LATIN)
    return text if len(text) <= _MOST_CHARACTERS and letters.fullmatch(text) else ""


def _clean(texts: Iterable[str], language: str) -> Iterator[str]:
    return filter(None, (clean_text(text, language) for text in texts))


def _pictured(nouns: list[Noun], things: list[str], language: str) -> list[list[Noun]]:
    """What phrases are made of: common nouns, and things that have been drawn or mapped, each as likely.

    Where a phrase needs the gender, things are those that the dictionary has.
    """
    if PHRASES[language].endings:
        known = {noun.name: noun for noun in nouns}
        named = [known[thing] for thing in things if thing in known]
    else:
        named = [Noun(thing) for thing in things]
    return [pool for pool in (nouns[:_PICTURED], named) if pool]


def _caption_texts(shards: list[str]) -> dict[str, list[str]]:
    """language -> names and keywords in the training split."""
    found: dict[str, dict[str, None]] = {}
    for shard in expand_shards(shards, "train") if shards else []:
        for entry in read_entries(shard):
            if isinstance(entry, Sample):
                for language, caption in entry.captions.items():
                    texts = (caption.name, *caption.others, *caption.keywords)
                    found.setdefault(language, {}).update(dict.fromkeys(texts))
    return {language: list(texts) for language, texts in found.items()}
