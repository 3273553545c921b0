"""Where a suffix stands in the templated prompt, and which suffixes a user could type."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opsa_jax.data.chat import Chat
from opsa_jax.errors import UserError

_MARK = "@@suffix@@"


@dataclass(frozen=True)
class Layout:
    """A prompt with room for a suffix, and the target that should follow:

        [before: template, user's text] [suffix] [after: end of turn, assistant opening] [target]

    Texts are those of the template; the suffix is written after a space.
    """

    before_text: str
    after_text: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    target: tuple[int, ...]

    @classmethod
    def of(cls, chat: Chat, prompt: str, target: str, system: str = "") -> "Layout":
        """From the template. Raises UserError for a template that repeats or rewrites the user's text, or a target without tokens."""
        rendered = chat.render(f"{prompt}{_MARK}", system=system)
        if rendered.count(_MARK) != 1:
            raise UserError(f"the chat template of {chat.path!r} does not write the user's text exactly once; GCG cannot place a suffix")
        before_text, _, after_text = rendered.partition(_MARK)
        before, after, target_ids = (tuple(x.tolist()) for x in chat.encode_texts([before_text, after_text, target]))
        if not target_ids:
            raise UserError(f"the target {target!r} of GCG has no tokens")
        return cls(before_text, after_text, before, after, target_ids)

    def row(self, S: int, P: int, R: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.int32]:
        """Arrays for the programs of gcg.py: the prompt ends in column P - 1, the target starts in column P.

        >>> x = Layout("", "", (5,), (6,), (7, 8))
        >>> row, mask, use, at = x.row(S=2, P=5, R=3)
        >>> row.tolist(), mask.tolist(), use.tolist(), int(at)
        ([0, 5, 0, 0, 6, 7, 8, 0], [0, 1, 1, 1, 1, 1, 1, 0], [1.0, 1.0, 0.0], 2)

        Returns:
            row_T int32, the suffix as zeros; mask_T int32; use_R float32; the first column of the suffix.
        """
        left, right = P - len(self.before) - S - len(self.after), R - len(self.target)
        row = [0] * left + [*self.before, *[0] * S, *self.after, *self.target] + [0] * right
        mask = [0] * left + [1] * (len(row) - left - right) + [0] * right
        use = [1.0] * len(self.target) + [0.0] * right
        return np.array(row, np.int32), np.array(mask, np.int32), np.array(use, np.float32), np.int32(left + len(self.before))


class Vocabulary:
    """Tokens that may stand in a suffix.

    Args:
        vocab_size: rows of the embedding.
        ascii_only: printable ASCII only.
    """

    def __init__(self, chat: Chat, vocab_size: int, ascii_only: bool = True):
        self.chat = chat
        tokenizer = chat.tokenizer
        size = min(len(tokenizer), vocab_size)
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        texts = tokenizer.batch_decode([[i] for i in range(size)], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        self.allowed_V = np.array([i not in special and _typable(t, ascii_only) for i, t in enumerate(texts)], bool)
        if not self.allowed_V.any():
            raise UserError(f"the tokenizer of {chat.path!r} has no token that a suffix may consist of")

    def text(self, ids: Sequence[int]) -> str:
        """The suffix as it is written after the prompt, with its space."""
        return " " + self.chat.decode(list(ids)).removeprefix(" ")

    def survive(self, suffixes: Sequence[Sequence[int]], layouts: Sequence[Layout]) -> list[bool]:
        """Which suffixes, written as text in every one of these prompts and tokenised again, are the same ids in the same place."""
        texts = [self.text(s) for s in suffixes]
        good = [bool(self.allowed_V[list(s)].all()) and t == t.rstrip() for s, t in zip(suffixes, texts, strict=True)]
        for layout in layouts:
            left = [i for i, g in enumerate(good) if g]
            encoded = self.chat.encode_texts([layout.before_text + texts[i] + layout.after_text for i in left])
            for i, ids in zip(left, encoded, strict=True):
                good[i] = ids.tolist() == [*layout.before, *suffixes[i], *layout.after]
        return good

    def first(self, S: int, layouts: Sequence[Layout], seed: int = 0) -> list[int]:
        """A suffix of S tokens to start from: `! ! ! !` (as published) where that survives, otherwise one drawn at random.

        Raises:
            UserError: none is found.
        """
        tries = [ids.tolist() for ids in self.chat.encode_texts([" !" * S])]
        tries = [t for t in tries if len(t) == S]
        rng, allowed = np.random.default_rng(seed), np.flatnonzero(self.allowed_V)
        tries += [rng.choice(allowed, S).tolist() for _ in range(200)]
        for ids, good in zip(tries, self.survive(tries, layouts), strict=True):
            if good:
                return ids
        raise UserError(f"found no suffix of {S} tokens that survives decoding and encoding; try fewer with --gcg.suffix-tokens")


def _typable(text: str, ascii_only: bool) -> bool:
    return bool(text.strip()) and "\ufffd" not in text and text.isprintable() and (text.isascii() or not ascii_only)
