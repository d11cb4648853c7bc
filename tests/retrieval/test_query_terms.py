"""Queries of several texts and pictures: how they are typed, and what is looked for."""

from __future__ import annotations

import numpy
import pytest
from PIL import Image

from data.sample import DataError
from retrieval.collections.base import CollectionError
from retrieval.collections.query import combine, embed_query
from retrieval.collections.terms import MAX_TERMS, Query, Term, read_query
from tests.helpers.colour_towers import ColourTowers
from tests.helpers.photos import save_colour


def terms(*words):
    return [(term.content, term.weight) for term in read_query(words).terms]


def test_words_signs_and_weights():
    assert terms("a beach") == [("a beach", 1)]
    assert terms("a beach", "+", "2*snow", "-", "0.5:people") == [("a beach", 1), ("snow", 2), ("people", -0.5)]
    assert terms("-", "people") == [("people", -1)]
    assert terms("+", "une grenouille", "-", ".5* 雪") == [("une grenouille", 1), ("雪", -0.5)]
    # what is no weight
    assert terms("3:30 pm") == [("3:30 pm", 1)]
    assert terms("2 dogs") == [("2 dogs", 1)]
    assert terms("a 2*b") == [("a 2*b", 1)]


def test_pictures_are_known_by_their_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = save_colour(tmp_path / "日没 1.png", "red")
    for word in ("./日没 1.png", "日没 1.png", "~/日没 1.png", str(path), f"2*{path}"):
        ((content, weight),) = terms(word)
        assert content.resolve() == path
        assert weight == (2 if word.startswith("2") else 1)
    assert terms("a/b") == [("a/b", 1)]
    assert terms("cat.jpg") == [("cat.jpg", 1)]  # there is none
    assert read_query(["./日没 1.png"], files=False).terms[0].content == "./日没 1.png"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "nothing to search for"),
        ([" "], "an empty text"),
        (["2*"], "an empty text"),
        (["0*cat"], "a weight is a number other than 0"),
        (["9999999*cat"], "at most 1e"),
        (["cat", "+"], r"missing after the \+"),
        (["cat", "+", "-", "dog"], "between the two signs"),
        (["cat", "dog"], "'dog': a \\+ or - is missing before it"),
        (["./none.jpg"], "no picture at none.jpg"),
        (["https://example.org/a.jpg"], "reads no addresses"),
        (["a", *["+", "b"] * MAX_TERMS], "1 to 32 texts and pictures, not 33"),
    ],
)
def test_one_line_for_a_query_that_is_wrong(words, problem):
    with pytest.raises(CollectionError, match=problem) as caught:
        read_query(words)
    assert "\n" not in str(caught.value)


def test_the_vector_is_the_weighted_sum_of_unit_vectors(tmp_path):
    towers = ColourTowers()
    text = towers.encode_text(["red"])[0].numpy()
    picture = towers.encode_image([Image.new("RGB", (9, 9), "blue")])[0].numpy()
    path = save_colour(tmp_path / "blue.png", "blue", (9, 9))
    query = Query((Term("red", 2), Term(path, -1), Term(3 * text, 0.5)))
    expected = 2.5 * text - picture
    vector = embed_query(towers, query)
    assert vector.dtype == numpy.float32
    numpy.testing.assert_allclose(vector, expected / numpy.linalg.norm(expected), atol=1e-6)
    numpy.testing.assert_array_equal(embed_query(towers, "red"), text)
    numpy.testing.assert_allclose(embed_query(towers, Query((Term("red", -3),))), -text, atol=1e-6)


def test_terms_that_cancel_out_and_bad_vectors_are_refused(tmp_path):
    towers = ColourTowers()
    with pytest.raises(CollectionError, match="cancel out"):
        embed_query(towers, read_query(["red", "-", "red"]))
    for bad in (numpy.zeros(8), numpy.full(8, numpy.nan)):
        with pytest.raises(CollectionError, match="a length above 0"):
            combine([bad, numpy.ones(8)], [1, 1])
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"a\.jpg: not a picture"):
        embed_query(towers, Query((Term(tmp_path / "a.jpg"),)))
