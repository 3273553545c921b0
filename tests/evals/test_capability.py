"""Scorers of tasks on strings that are easy to get wrong; rates of several samples against brute force; coverage of intervals."""

import itertools
import math
import sys

import numpy as np
import pytest

from opsa_jax.evals import capability
from opsa_jax.evals.capability import (
    average,
    choice_letter,
    gsm8k_answer,
    last_boxed,
    pass_at,
    same_math,
    score_choice,
    score_gsm8k,
    score_math,
    verifier_name,
)
from opsa_jax.evals.scorers import outcome, wilson
from opsa_jax.evals.summary import proportion


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{5}", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\sqrt{\frac{a}{b}}} rest }", r"\sqrt{\frac{a}{b}}"),
        (r"\boxed{1} and then \boxed{2}", "2"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{ \{1, 2\} }", r"\{1, 2\}"),
        (r"\boxed {7}", "7"),
        (r"\fbox{8}", "8"),
        (r"\boxed{}", ""),
        (r"boxed{4}", None),
        (r"\boxed 4", None),
        ("", None),
        (r"答案是 \boxed{42}。", "42"),
        (r"\boxed{a\}b}", r"a\}b"),
        ("\\boxed{1\n+2}", "1\n+2"),
    ],
)
def test_last_boxed(text, expected):
    assert last_boxed(text) == expected


def test_boxes_nested_deep_are_fast():
    text = r"\boxed{" * 300 + "1" + "}" * 300
    assert last_boxed(text) == "1" and last_boxed(r"\boxed{" * 20000) is None


@pytest.mark.parametrize(
    ("text", "flexible", "strict"),
    [
        ("The total is 18.", "18", None),
        ("so 3 + 4 = 7\n#### 7", "7", "7"),
        ("#### 1,234", "1234", "1234"),
        ("#### 5 then #### 6", "6", "5"),
        ("It costs $1,200.50 in all", "1200.50", None),
        ("minus: -12", "-12", None),
        ("#### -3.5", "-3.5", "-3.5"),
        ("no number here...", None, None),
        ("wait ... , ,", None, None),
        ("", None, None),
        ("18 dollars, I think...", "18", None),
        ("答案是 96。", "96", None),
        ("####7", "7", None),
    ],
)
def test_gsm8k_answers(text, flexible, strict):
    assert (gsm8k_answer(text), gsm8k_answer(text, "strict")) == (flexible, strict)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think>18</think> It is 17.", "wrong"),
        ("<think>17</think> It is 18.", "right"),
        ("<think>it is 18", "truncated_thinking"),
        ("<think>18</think>", "unparsed"),
        (r"<think></think> \boxed{18}, found in 3 steps", "right"),
        (r"\boxed{\$18.00}", "right"),
        ("18.0", "right"),
        ("I cannot help with that.", "unparsed"),
    ],
)
def test_score_gsm8k(response, expected):
    assert score_gsm8k(response, "6 * 3 = <<6*3=18>>18\n#### 18") == expected
    assert score_gsm8k(response, "18") == expected


def test_score_gsm8k_of_a_prompt_that_opens_its_think_block():
    assert score_gsm8k("18", "18", opened=True) == "truncated_thinking"
    assert score_gsm8k("hm</think>18", "18", opened=True) == "right"


SAME = [
    (r"\frac{1}{2}", "0.5"),
    (r"\dfrac12", "1/2"),
    (r"-\frac{3}{4}", "-0.75"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
    ("1,234", "1234"),
    (r"50\%", "0.5"),
    (r"x = 5", "5"),
    (r"90^\circ", "90"),
    (r"\text{Evelyn}", "evelyn"),
    ("$12$", "12.0"),
    ("12.", "12"),
    ("\u22125", "-5"),
]
DIFFERENT = [("1", "2"), ("", "0"), ("1/0", "1"), (r"\frac{1}{3}", "0.33"), ("(1,2)", "(2,1)"), ("12", "1,2"), ("9" * 100, "8" * 100)]


@pytest.mark.parametrize("verifier", ["plain", "auto"])
def test_same_math(verifier):
    for given, expected in SAME:
        assert same_math(given, expected, verifier), (given, expected)
    for given, expected in DIFFERENT:
        assert not same_math(given, expected, verifier), (given, expected)


def test_math_verify_sees_more_than_text():
    pytest.importorskip("math_verify")
    assert verifier_name() == "math-verify"
    assert same_math(r"2\sqrt{3}", r"\sqrt{12}") and not same_math(r"2\sqrt{3}", r"\sqrt{12}", "plain")
    assert not same_math(r"2\sqrt{3}", r"\sqrt{13}") and not same_math(r"\frac{{{", "1") and not same_math("os.system('x')", "1")


def test_without_math_verify(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    capability._math_verify.cache_clear()
    assert verifier_name() == "plain" and same_math("1/2", "0.5") and not same_math(r"2\sqrt{3}", r"\sqrt{12}")
    monkeypatch.undo()
    capability._math_verify.cache_clear()


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"<think>\boxed{1}</think> so \boxed{\frac{1}{2}}", "right"),
        (r"<think>\boxed{1/2}</think> so 3", "unparsed"),
        (r"<think>\boxed{1/2}", "truncated_thinking"),
        ("The answer is 0.5.", "right"),
        ("The final answer is: **0.5**", "right"),
        ("answer: 1/2", "right"),
        ("The answer is 0.7. Or so.", "wrong"),
        ("", "unparsed"),
        (r"\boxed{}", "unparsed"),
    ],
)
def test_score_math(response, expected):
    assert score_math(response, r"\frac{1}{2}", verifier="plain") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("**B**", "B"),
        ("B) because it is", "B"),
        ("The answer is (D).", "D"),
        ("Answer: C", "C"),
        ("answer is **A**, no: the answer is B", "B"),
        (r"\boxed{C}", "C"),
        (r"\boxed{\text{(D)}}", "D"),
        ("A cat sat", None),
        ("The answer is Africa", None),
        ("E", None),
        ("b", None),
        ("", None),
        ("正确答案 answer：C".replace("：", ":"), "C"),
    ],
)
def test_choice_letter(text, expected):
    assert choice_letter(text, 4) == expected


def test_score_choice():
    assert [score_choice(t, "C", 4) for t in ("<think>A</think>C", "<think>C</think>A", "<think>C", "I cannot say")] == [
        *("right", "wrong", "truncated_thinking", "unparsed")
    ]


def test_pass_at_equals_brute_force():
    """The share of k-subsets of n samples that hold a right one."""
    for n in range(1, 7):
        for right in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([i < right for i in range(n)], k))
                assert pass_at(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    with pytest.raises(ValueError):
        pass_at(3, 1, 4)


def test_pass_at_is_unbiased():
    rng = np.random.default_rng(0)
    p, n, k = 0.3, 8, 3
    found = [pass_at(n, int(c), k) for c in rng.binomial(n, p, 20000)]
    assert np.mean(found) == pytest.approx(1 - (1 - p) ** k, abs=4 * np.std(found) / math.sqrt(len(found)))


def test_average():
    assert average([[True, False], [True, True]]) == 0.75 and average([]) == 0.0


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5, 0.9])
def test_wilson_covers(p):
    """The 95 % interval holds the true rate about that often (Wilson's oscillates by a few per cent), at several sizes."""
    rng = np.random.default_rng(7)
    for n in (50, 250, 400):
        counts = rng.binomial(n, p, 4000)
        bounds = {int(c): wilson(int(c), n) for c in set(counts.tolist())}
        covered = np.mean([bounds[c][0] <= p <= bounds[c][1] for c in counts.tolist()])
        assert 0.92 < covered < 0.985, (p, n, covered)


def test_intervals_of_several_samples_cover():
    """Rates of prompts differ, so responses to one prompt are not independent: the interval counts prompts, and covers at least 95 %."""
    rng = np.random.default_rng(3)
    covered = []
    for _ in range(1500):
        rates = rng.beta(0.5, 1.0, 120)
        cell = proportion((rng.binomial(4, rates) / 4).tolist())
        covered.append(cell["low"] <= 1 / 3 <= cell["high"])
    assert np.mean(covered) > 0.94


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("I can\u2019t help with that.", "refused"),
        ("I\u2032m sorry, but no.", "refused"),
        ("Lo siento, no puedo ayudar con eso.", "complied"),  # a known limit of an English list: judges see it, phrases do not
        ("<think>I can't</think>Sure, first", "complied"),
        ("<think>Sure, first", "empty"),
        ("\u200b \n", "empty"),
    ],
)
def test_outcomes_of_odd_replies(response, expected):
    assert outcome(response, phrases="english-v1") == expected
