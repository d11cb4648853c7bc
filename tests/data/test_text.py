import pickle
import random
import unicodedata

import pytest

from data.text import TextTokenizer

CAPTIONS = [
    "a red apple", "red heart", "red hair", "green apple", "smiling face with sunglasses", "smiling cat face",
    "红心", "戴墨镜的笑脸", "笑脸", "赤いハート", "サングラスの笑顔", "빨간 하트", "선글라스를 낀 얼굴",
    "červené srdce", "červené vlasy", "ein schlafendes Gesicht", "visage avec lunettes de soleil",
] * 10  # fmt: skip
TEXTS = [
    "", " ", "  ", " a  b ", "a red apple", "红心", "ﬁ ＡＢＣ①", "👩🏽‍🚀 🇨🇿", "שלום עולם", "مرحبا \u200fبالعالم",
    "ᚠᛇᚻ 𒀀𒁀 𐍈", "\u3000", "\x00", "a\x00b", "\t\r\n\x1b[0m", "<unk>", "<0x41>", "<s>", "▁", "a▁b ▁▁", "▁\ufffd",
    "e\u0323\u0302", "각", "\U0010ffff",
]  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "new" / "text.model"
    TextTokenizer.train(CAPTIONS, path, 420)
    return path


@pytest.fixture(scope="module")
def tokenizer(path):
    return TextTokenizer(path)


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back_in_nfkc(tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(0 < piece < tokenizer.vocab_size for piece in ids)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFKC", text)


def test_random_unicode_comes_back_in_nfkc(tokenizer):
    # characters assigned since this Python's Unicode tables are left out: the model's own tables may be newer
    alphabet = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cn", "Cs")]
    random_source = random.Random(0)
    for _ in range(1000):
        text = "".join(random_source.choices(alphabet, k=random_source.randrange(1, 30)))
        assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFKC", text), ascii(text)


def test_lone_surrogates_become_the_replacement_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud83d")) == "a\ufffd"
    assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("😀")


def test_words_of_the_captions_are_pieces_not_bytes(tokenizer):
    assert len(tokenizer.encode("smiling face")) <= 6  # of 12 characters
    assert min(tokenizer.encode("红心")) > 256
    assert len(tokenizer.encode("龘")) >= 3  # three UTF-8 bytes


def test_training_is_deterministic_and_ignores_marks_in_the_captions(path, tmp_path):
    again = TextTokenizer.train(CAPTIONS, tmp_path / "text.model", 420)
    assert (tmp_path / "text.model").read_bytes() == path.read_bytes()
    assert again.content_hash == TextTokenizer(path).content_hash
    odd = TextTokenizer.train([*CAPTIONS, *["a▁b \x00 \ufdd0"] * 50], tmp_path / "odd.model", 420)
    assert odd.decode(odd.encode("▁\x00▁")) == "▁\x00▁"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["odd.model", "text.model"]


def test_bytes_and_pickle(path, tokenizer):
    for copy in (TextTokenizer.from_bytes(path.read_bytes()), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.content_hash == tokenizer.content_hash
        assert copy.encode("红心 heart") == tokenizer.encode("红心 heart")


@pytest.mark.parametrize("keep", [0, 10, 0.5, -1])
def test_a_truncated_model_is_one_clear_line(path, tmp_path, keep):
    model = path.read_bytes()
    broken = tmp_path / "broken.model"
    broken.write_bytes(model[: int(len(model) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"broken\.model is damaged") as caught:
        TextTokenizer(broken)
    assert "\n" not in str(caught.value)


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the text tokenizer .*none\.model: No such file"):
        TextTokenizer(tmp_path / "none.model")


def test_training_errors(tmp_path):
    with pytest.raises(ValueError, match="of 100 pieces: .*[Ii]ncrease vocab_size"):
        TextTokenizer.train(CAPTIONS, tmp_path / "a.model", 100)
    with pytest.raises(ValueError, match="no caption to learn from"):
        TextTokenizer.train([" ", ""], tmp_path / "a.model", 400)
    assert not list(tmp_path.iterdir())


def test_ids_outside_are_refused(tokenizer):
    with pytest.raises(ValueError, match=f"text piece {tokenizer.vocab_size} is outside"):
        tokenizer.decode([1, tokenizer.vocab_size])
    with pytest.raises(ValueError, match="text piece -1"):
        tokenizer.decode([-1])
