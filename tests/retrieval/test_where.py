"""The filter: what it reads, how stores read it again, and that nothing else gets through."""

from __future__ import annotations

import pytest

from retrieval.collections.where import (
    MAX_LENGTH,
    Comparison,
    Inverse,
    Junction,
    WhereError,
    all_of,
    parse_where,
    to_milvus,
    to_sql,
)

COLUMNS = {"family": str, "year": int, "score": float, "animated": bool}


def test_precedence_is_that_of_sql():
    a, b, c = (Comparison("year", "=", (k,)) for k in (1, 2, 3))
    assert parse_where("year = 1 OR year = 2 AND year = 3", COLUMNS) == Junction("or", (a, Junction("and", (b, c))))
    assert parse_where("(year = 1 or year = 2) and year = 3", COLUMNS) == Junction("and", (Junction("or", (a, b)), c))
    assert parse_where("NOT year = 1 AND year = 2", COLUMNS) == Junction("and", (Inverse(a), b))
    assert parse_where("((((year=1))))", COLUMNS) == a


@pytest.mark.parametrize(
    ("text", "sql", "milvus"),
    [
        ("family = 'it''s'", "(`family` = 'it''s')", '(family == "it\'s")'),
        ("family <> '\"\\'", "(`family` != '\"\\')", '(family != "\\"\\\\")'),
        ("family = '红心; DROP'", "(`family` = '红心; DROP')", '(family == "红心; DROP")'),
        ("family = '{} {0}'", "(`family` = '{} {0}')", '(family == "{} {0}")'),
        ("family IN ('{}', 'b')", "(`family` in ('{}', 'b'))", '(family in ["{}", "b"])'),
        ("year >= -5", "(`year` >= -5)", "(year >= -5)"),
        ("score < 1e3", "(`score` < 1000.0)", "(score < 1000.0)"),
        ("animated = TRUE", "(`animated` = true)", "(animated == true)"),
        ("year not in (1,2)", "(not (`year` in (1, 2)))", "(not (year in [1, 2]))"),
        (
            "not family = 'a' or year > 1 and year < 9",
            "((not (`family` = 'a')) or ((`year` > 1) and (`year` < 9)))",
            '((not (family == "a")) or ((year > 1) and (year < 9)))',
        ),
    ],
)
def test_rendering(text, sql, milvus):
    expression = parse_where(text, COLUMNS)
    assert to_sql(expression) == sql
    assert to_milvus(expression) == milvus


@pytest.mark.parametrize(
    ("fraction", "whole"),
    [
        ("year > 2016.5", "year > 2016"), ("year >= 2016.5", "year >= 2017"), ("year < 2016.5", "year < 2017"),
        ("year <= 2016.5", "year <= 2016"), ("year = 2017.0", "year = 2017"), ("year != 2017.0", "year != 2017"),
        ("year > 2017.0", "year > 2017"), ("year > -0.5", "year > -1"),
        ("year IN (2016, 2016.5, 1e3)", "year IN (2016, 1000)"),
        ("year NOT IN (2016.5, 7)", "NOT year IN (7)"), ("year = 2016.5", "year = 0 AND year = 1"),
        ("year IN (0.5)", "year = 0 AND year = 1"), ("year != 2016.5", "year = 0 OR year != 0"),
        ("year < 1e300", "year = 0 OR year != 0"), ("year > 1e300", "year = 0 AND year = 1"),
        ("year >= -1e300", "year = 0 OR year != 0"), ("year <= -1e300", "year = 0 AND year = 1"),
        ("NOT year > 1.5 AND animated = true", "NOT year > 1 AND animated = true"),
    ],
)  # fmt: skip
def test_whole_numbers_compare_with_fractions(fraction, whole):
    assert parse_where(fraction, COLUMNS) == parse_where(whole, COLUMNS)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("score < 1e999", "the number 1e999 is too large"),
        ("year < 1e999", "the number 1e999 is too large"),
        ("", "cannot read its end"),
        ("family = ", "cannot read its end"),
        ("family = noto", "cannot read 'noto' at character 10"),
        ("family = 'a' OR 1 = 1", "cannot read '1 = 1' at character 17"),
        ("family = 'a'; DROP TABLE items", "cannot read '; DROP"),
        ("family = 'a' -- ", "cannot read '--"),
        ("family LIKE 'a%'", "cannot read \"LIKE 'a%'\" at character 8"),
        ("upper(family) = 'A'", "cannot read"),
        ("(SELECT 1) = 1", "cannot read"),
        ("family = 'a", 'cannot read "\'a"'),
        ('"family" = 1', "cannot read"),
        ("family IN ()", r"cannot read '\)'"),
        ("vector = 1", "no column 'vector'; there are: family, year, score, animated"),
        ("Family = 'a'", "no column 'Family'"),
        ("year = 'a'", "year is an integer, compared with 'a'"),
        ("year = true", "compared with true"),
        ("family > 1", "family is text, compared with 1"),
        ("family IN ('a', 1)", "compared with 1"),
        ("animated > false", "has no >"),
        ("year = 9223372036854775808", "does not fit into 64 bits"),
        ("year = " + "9" * 5000, "does not fit into 64 bits"),
        ("NOT " * 500 + "year = 1", "nested deeper than 20"),
        ("(" * 3000 + "year = 1", "cannot read its end"),
        ("year = 1" + " " * MAX_LENGTH, "at most 10000"),
    ],
)
def test_everything_else_is_refused_in_one_line(text, problem):
    with pytest.raises(WhereError, match=problem) as caught:
        parse_where(text, COLUMNS)
    assert "\n" not in str(caught.value)


def test_many_parentheses_do_not_exhaust_the_stack():
    assert parse_where("(" * 4000 + "year = 1" + ")" * 4000, COLUMNS) == Comparison("year", "=", (1,))


def test_conditions_are_bound_whole():
    """What is joined by AND cannot be widened by what one of the parts says."""
    assert all_of([]) is None
    assert all_of(["a = 1", "b = 2 OR c = 3"]) == "(a = 1) AND (b = 2 OR c = 3)"
    for widening in ("b = 2) OR (c = 3", "b = 2) OR (c = 3) OR (c = 4", ") OR (", "b = 2) AND NOT (c = 3", ""):
        with pytest.raises(WhereError, match="cannot read"):
            all_of(["a = 1", widening])
