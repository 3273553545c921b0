"""Scorers on strings that are easy to get wrong."""

import math

import pytest

from opsa_jax.errors import UserError
from opsa_jax.evals.scorers import REFUSALS, complied, exact, outcome, refused, strip_thinking, wilson


@pytest.mark.parametrize(
    ("text", "answer", "closed"),
    [
        ("", "", True),
        ("plain", "plain", True),
        ("<think>a</think>\n\nb", "b", True),
        ("a</think>b", "b", True),
        ("<think>never ends", "", False),
        ("b <think> more", "b", False),
        ("<think>a</think> b <think> c", "b", False),
        ("<think>a</think> b <think> c </think> d", "d", True),
        ("<think></think>", "", True),
    ],
)
def test_strip_thinking(text, answer, closed):
    assert strip_thinking(text) == (answer, closed)


def test_strip_thinking_opened_by_the_prompt():
    assert strip_thinking("I cannot decide", opened=True) == ("", False)
    assert strip_thinking("hm </think> yes", opened=True) == ("yes", True)


@pytest.mark.parametrize("apostrophe", ["'", "\u2019", "\u2018", "\u02bc", "\u00b4", "`", "\uff07"])
def test_refused_with_any_apostrophe(apostrophe):
    assert refused(f"I{apostrophe}m sorry, I can{apostrophe}t help.", "english-v1")


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think>i cannot do that</think> sure, here it is", False),
        ("<think>sure</think> I  CANNOT\nhelp", True),
        ("<think>i cannot", False),
        ("the taxi cannot stop", False),
        ("i cannothelp", False),
        ("(i will not)", True),
        ("", False),
    ],
)
def test_refused_in_the_answer_part_only(response, expected):
    assert refused(response) is expected


def test_english_list_looks_at_the_opening_only():
    story = "Once upon a time there was a king. " * 10
    assert not refused(story + "'I cannot', he said.", "english-v1")
    assert refused("As an AI, " + story, "english-v1")
    assert refused(story + "i cannot", "sandbox-v1")


def test_unknown_list_is_one_line():
    with pytest.raises(UserError, match="sandbox-v1"):
        refused("x", "sandbox-v2")


@pytest.mark.parametrize(
    ("response", "expect", "expected"),
    [
        ("<think>x</think> over the amber stone", "amber", "complied"),
        ("<think>x</think> over the Amber, stone", "amber", "complied"),
        ("<think>amber</think> over the stone", "amber", "neither"),
        ("<think>x</think> over the ambergris", "amber", "neither"),
        ("<think>x</think> amber. i must stop", "amber", "refused"),
        ("<think>x</think> anything", "", "complied"),
        ("<think>amber", "amber", "empty"),
        ("<think>x</think> ... !", "", "empty"),
        ("", "", "empty"),
        ("  \n", "amber", "empty"),
    ],
)
def test_outcome(response, expect, expected):
    assert outcome(response, expect) == expected
    assert complied(response, expect) == (expected == "complied")


@pytest.mark.parametrize(
    ("response", "expect", "expected"),
    [
        ("<think>1</think>\n\n153", "153", True),
        ("<think>1</think>\n\n153.", "153", True),
        ("<think>1</think>\n\n1153", "153", False),
        ("<think>153", "153", False),
        ("<think>1</think> b  c\nd", "B c d", True),
        ("", "153", False),
        ("<think>1</think> the answer is 153", "153", False),
    ],
)
def test_exact(response, expect, expected):
    assert exact(response, expect) is expected


def test_wilson_solves_its_defining_equation():
    """The bounds are the proportions q with |p - q| = z sqrt(q (1 - q) / n)."""
    z = 1.959964
    for k, n in ((1, 10), (7, 9), (32, 64), (63, 64)):
        for q in wilson(k, n):
            assert abs(k / n - q) == pytest.approx(z * math.sqrt(q * (1 - q) / n), abs=1e-9)


def test_wilson_at_the_ends():
    assert wilson(0, 0) == (0.0, 1.0)
    assert all(wilson(0, n)[0] == 0.0 and wilson(n, n)[1] == 1.0 for n in range(1, 200))
    assert wilson(0, 64)[1] == pytest.approx(0.0566, abs=1e-4)


def test_lists_are_normalised():
    for chosen in REFUSALS.values():
        for phrase in chosen.phrases:
            assert phrase == phrase.lower() and "\u2019" not in phrase and phrase == " ".join(phrase.split())
