"""Scoring of answers to tasks: mathematics, multiple choice, and several samples of one question. Pure functions on text.

Every scorer looks at the answer part only (`scorers.strip_thinking`); a think block that never ends is its own outcome:

    right               the answer equals the expected one
    wrong               an answer was found, and it does not
    unparsed            no answer was found
    truncated_thinking  the think block never ended, so there is no answer part
"""

import functools
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

from opsa_jax.evals.scorers import strip_thinking

TaskOutcome = Literal["right", "wrong", "unparsed", "truncated_thinking"]

# GSM8K's two filters, as the lm-eval harness defines them (tasks/gsm8k).
_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)")


def last_boxed(text: str) -> str | None:
    r"""Content of the last complete \boxed{...} or \fbox{...}, braces balanced; None where there is none.

    Escaped braces (\{ and \}) do not count. A box that is never closed is passed over.

    >>> last_boxed(r"so \boxed{1}, no: \boxed{\frac{1}{2}}. \boxed{3")
    '\\frac{1}{2}'
    """
    opened: list[int] = []
    """Starts of the contents of open boxes; -1 for other braces."""
    found = -1, -1
    for m in re.finditer(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", text, re.DOTALL):
        if m.group().endswith("{") and m.group() != "\\{":
            opened.append(m.end() if len(m.group()) > 1 else -1)
        elif m.group() == "}" and opened:
            found = max(found, (opened.pop(), m.start()))
    return text[found[0] : found[1]].strip() if found[0] >= 0 else None


def gsm8k_answer(text: str, mode: Literal["flexible", "strict"] = "flexible") -> str | None:
    """The number a GSM8K answer ends with: after `####` (strict, the first one) or simply the last number (flexible).

    >>> gsm8k_answer("6 * 3 = 18 dollars."), gsm8k_answer("So it is $1,234.\\n#### 1,234", "strict"), gsm8k_answer("18", "strict")
    ('18', '1234', None)
    """
    if mode == "strict":
        found = _STRICT.search(text)
        number = found.group(1) if found else None
    else:
        matches = [a or b for a, b in _FLEXIBLE.findall(text)]
        number = next((m for m in reversed(matches) if any(c.isdigit() for c in m)), None)
    number = None if number is None else number.replace(",", "").replace("$", "").rstrip(".")
    return number if number and any(c.isdigit() for c in number) else None


def score_gsm8k(response: str, answer: str, mode: Literal["flexible", "strict"] = "flexible", opened: bool = False) -> TaskOutcome:
    """`answer` is the reference solution, or its number."""
    text, closed = strip_thinking(response, opened)
    if not closed:
        return "truncated_thinking"
    gold = (gsm8k_answer(answer, "strict") or gsm8k_answer(answer)) if "####" in answer else answer.strip().replace(",", "")
    boxed = last_boxed(text) if mode == "flexible" else None
    given = (gsm8k_answer(boxed) if boxed else None) or gsm8k_answer(text, mode)
    if given is None:
        return "unparsed"
    return "right" if gold is not None and _same_number(given, gold) else "wrong"


def score_math(response: str, answer: str, opened: bool = False, verifier: str = "auto") -> TaskOutcome:
    r"""The last \boxed{} against the expected answer; without a box, what follows the last "answer is".

    Args:
        verifier: `math-verify`, `plain` or `auto` (math-verify where it is installed); see `same_math`.
    """
    text, closed = strip_thinking(response, opened)
    if not closed:
        return "truncated_thinking"
    given = last_boxed(text)
    if given is None:
        said = re.findall(r"answer\s*(?:is|:|=)\s*:?\s*([^\n]+)", text, re.IGNORECASE)
        given = re.split(r"(?<=[^\d])[.](?:\s|$)|\.\s|\.$", said[-1], maxsplit=1)[0].strip(" *") if said else None
    if not given:
        return "unparsed"
    return "right" if same_math(given, answer, verifier) else "wrong"


@functools.cache
def _math_verify() -> tuple[Any, Any] | None:
    try:
        from math_verify import parse, verify
    except ImportError:
        return None
    return parse, verify


def verifier_name(verifier: str = "auto") -> str:
    """Which of the two comparisons `auto` means here: results name it, since it decides numbers."""
    return ("math-verify" if _math_verify() else "plain") if verifier == "auto" else verifier


def same_math(given: str, expected: str, verifier: str = "auto") -> bool:
    r"""Whether two LaTeX answers are the same.

    `plain` removes what only sets the type (\left, \text, \dfrac, $, spaces, degrees, thousands separators, a leading `x =`) and
    compares texts, and numbers by value (1/2 = \frac12 = 0.5 = 50\%). `math-verify` (the package of that name) also compares sets,
    intervals and equivalent expressions; what it cannot read falls back to `plain`.

    >>> same_math(r"\dfrac{1}{2}", "0.5", "plain"), same_math(r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})", "plain")
    (True, True)
    """
    if _plain_same(given, expected):
        return True
    tools = _math_verify() if verifier_name(verifier) == "math-verify" else None
    if tools is None:
        return False
    parse, verify = tools
    try:
        return bool(verify(parse(f"\\boxed{{{expected}}}"), parse(f"\\boxed{{{given}}}")))
    except Exception:  # it parses arbitrary text, and fails in many ways on what is not mathematics
        return False


def _plain_same(given: str, expected: str) -> bool:
    a, b = _math_text(given), _math_text(expected)
    if a == b:
        return bool(a)
    x, y = _value(a), _value(b)
    return x is not None and y is not None and abs(x - y) <= Fraction(1, 10**9) * max(abs(y), 1)


_SPACES = (r"\left", r"\right", r"\!", r"\,", r"\;", r"\:", r"\ ", " ")
_DROPPED = (*_SPACES, "$", r"^{\circ}", r"^\circ", r"\displaystyle", r"\mathrm", "\u00b0")


def _math_text(text: str) -> str:
    text = re.sub(r"\\(?:text|mbox|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", text.strip())
    text = re.sub(r"\\[dtc]frac", r"\\frac", text).replace("\\%", "%").replace("\u2212", "-")
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    for piece in _DROPPED:
        text = text.replace(piece, "")
    text = re.sub(r"(?<=\d),(?=\d{3}(\D|$))", "", text)
    text = re.sub(r"^[a-zA-Z]=", "", text)
    return text.rstrip(".").lower()


def _value(text: str) -> Fraction | None:
    """A number, a fraction or a percentage by value."""
    scale = Fraction(1, 100) if text.endswith("%") else Fraction(1)
    text = re.sub(r"^(-?)\\frac\{(-?[\d.]+)\}\{(-?[\d.]+)\}$", r"\1\2/\3", text.rstrip("%")).replace("--", "")
    top, slash, bottom = text.partition("/")
    if not _NUMBER.fullmatch(top) or (slash and not _NUMBER.fullmatch(bottom)) or len(text) > 60:
        return None
    try:
        return scale * Fraction(top) / (Fraction(bottom) if slash else 1)
    except (ValueError, ZeroDivisionError):
        return None


def _same_number(a: str, b: str) -> bool:
    x, y = _value(a), _value(b)
    return x == y if x is not None and y is not None else a == b


def choice_letter(text: str, n: int) -> str | None:
    """The letter of the option an answer names, of the first n letters: boxed, after "answer", or alone; the last one counts.

    >>> choice_letter("A is tempting, but the answer is (C).", 4), choice_letter("**B**", 4), choice_letter("A cat", 4)
    ('C', 'B', None)
    """
    letters = "ABCDEFGHIJ"[:n]
    boxed = last_boxed(text)
    if boxed and (found := re.fullmatch(rf"(?:\\text\{{)?\W*([{letters}])\W*", boxed)):
        return found.group(1)
    said = re.findall(rf"(?i:answer(?:\s+is)?)\s*[:=]?\s*[*\"'(\[\s]*([{letters}])(?![\w'])", text)
    if said:
        return said[-1]
    found = re.fullmatch(rf"\W*([{letters}])(?:[).:\]*]\W*.*)?\W*", text.strip(), re.DOTALL)
    return found.group(1) if found else None


def score_choice(response: str, answer: str, n: int, opened: bool = False) -> TaskOutcome:
    """`answer` is the letter."""
    text, closed = strip_thinking(response, opened)
    if not closed:
        return "truncated_thinking"
    given = choice_letter(text, n)
    return "unparsed" if given is None else "right" if given == answer else "wrong"


def pass_at(n: int, right: int, k: int) -> float:
    """Chance that at least one of k samples, drawn without replacement from n of which some are right, is right
    (Chen et al. 2021, arXiv 2107.03374, Eq. 1: unbiased for the pass rate of k fresh samples).

    >>> pass_at(4, 1, 1), pass_at(4, 1, 4), pass_at(4, 2, 2)
    (0.25, 1.0, 0.8333333333333334)

    Raises:
        ValueError: k above n, or counts out of range.
    """
    if not 0 <= right <= n or not 1 <= k <= n:
        raise ValueError(f"n={n}, right={right}, k={k}")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def average(rights: Sequence[Sequence[bool]]) -> float:
    """avg@n: mean over questions of the share of right samples."""
    return sum(sum(r) / len(r) for r in rights) / max(len(rights), 1)
