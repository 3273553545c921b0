"""The checkpoint's own tokenizer and chat template: contexts into prompts, prompts into ids, ids into text.

A response is never tokenised here: training appends the ids that were sampled (arXiv 2605.15239, Eq. 2), so that token j of the
response is the same token, in the same place, for student and teacher. What this file guarantees is the place:

    student   [..., user turn,              assistant opening] + response ids
    teacher   [..., context, user turn,     assistant opening] + response ids
                                            ^ same ids at the end of both prompts (`preflight`)
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from opsa_jax import paths
from opsa_jax.errors import UserError

if TYPE_CHECKING:
    from opsa_jax.data.pipeline import Example

Placement = Literal["system", "user"]
_PROBE = "What is 2 + 3?"
_ANSWER = "It is 5."


@dataclass(frozen=True)
class Chat:
    """A tokenizer with its template, and everything the run derives from them."""

    path: str
    tokenizer: Any
    thinking: Literal["auto", "on", "off"] = "auto"
    stop_ids: tuple[int, ...] = ()
    """Ids that end a response: eos of the tokenizer and of generation_config.json, and the template's end of turn."""
    pad_id: int = 0
    """Filler for padded columns. Its value never matters: masks say what is padding."""
    end_id: int = 0
    """Ends a given response: the template's end of turn, or else the first stop id."""
    ignores_switch: bool = False
    """`thinking` is on or off, but the template renders the same text for both."""
    closes_think: bool = False
    """thinking=off on such a template that opens a think block: `render` closes the block, empty."""
    splitter: re.Pattern | None = None
    """Matches the tokens at which a text may be cut and tokenised in pieces; None where the tokenizer looks across them."""

    @classmethod
    def load(cls, path: str, revision: str = "main", thinking: Literal["auto", "on", "off"] = "auto") -> "Chat":
        """From a local folder in Hugging Face format, a hub name, or `sandbox:base`. Code in checkpoints is never run.

        Raises:
            UserError: no usable tokenizer there, or one without a chat template.
        """
        from transformers import AutoTokenizer
        from transformers.utils import logging

        where = str(paths.resolve(path))
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # transformers explains at length what the one line below says
        try:
            tokenizer = AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as e:
            reason = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
            raise UserError(
                f"no tokenizer at {path!r} ({reason.strip()}); "
                "give a local folder in Hugging Face format, a hub name org/name, or sandbox:base"
            ) from None
        finally:
            logging.set_verbosity(verbosity)
        try:
            tokenizer.get_chat_template()
        except ValueError:
            raise UserError(f"the tokenizer of {path!r} has no chat template; use an instruction-tuned checkpoint, or add one") from None
        chat = cls(path, tokenizer, thinking)
        chat.render(_PROBE)  # a template that cannot even do this is refused here
        end = chat._end_of_turn()
        stops = [tokenizer.eos_token_id, *_generation_eos(where, revision), end]
        stops = tuple(dict.fromkeys(i for i in stops if i is not None))
        end = next(iter(stops), 0) if end is None else end
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(stops), 0)
        ignores = thinking != "auto" and chat._template(_probe(), enable_thinking=True) == chat._template(_probe(), enable_thinking=False)
        closes = ignores and thinking == "off" and chat._template(_probe()).rstrip().endswith("<think>")
        chat = dataclasses.replace(chat, stop_ids=stops, pad_id=pad, end_id=end, ignores_switch=ignores, closes_think=closes)
        return dataclasses.replace(chat, splitter=chat._safe_splitter())

    def render(self, prompt: str, context: str = "", placement: Placement = "system", system: str = "") -> str:
        """The text of a prompt up to and including the assistant opening.

        Args:
            prompt: The user's text.
            context: What only a teacher sees; empty for none.
            placement: `system`: the context is the system message, before the record's own `system` text if it has one.
                `user`: it is put before the prompt, in the user's turn. A blank line separates the two in both cases.
            system: The record's own system message; empty for none.

        Raises:
            UserError: a system message is needed, and the template rejects or silently drops it.
        """
        import jinja2

        if context and placement == "user":
            prompt = f"{context}\n\n{prompt}"
        elif context:
            system = f"{context}\n\n{system}" if system else context
        messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": prompt}]
        try:
            text = self._template(messages)
        except jinja2.TemplateError as e:
            if not system:
                raise UserError(f"the chat template of {self.path!r} cannot render a user message: {e}") from None
            raise UserError(f"the chat template of {self.path!r} rejects system messages ({e}); {_USE_USER}") from None
        if system and system.strip() not in text:
            raise UserError(f"the chat template of {self.path!r} drops system messages; {_USE_USER}")
        if self.closes_think:
            text = text.rstrip() + "\n\n</think>\n\n"
        return text

    def encode(self, prompt: str, context: str = "", placement: Placement = "system", system: str = "") -> list[int]:
        """Ids of `render(...)`; the same as the tokenizer's own `apply_chat_template(..., tokenize=True)`."""
        return self.encode_texts([self.render(prompt, context, placement, system)])[0].tolist()

    def encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of rendered texts. No special tokens are added: the template has written them.

        Texts are cut at special tokens, and each different piece is tokenised once: a context shared by thousands of prompts
        costs as much as one, and a prompt as much with the context as without.
        """
        if self.splitter is None:
            return [np.asarray(ids, np.int32) for ids in self._tokenize(texts)]
        cut = [[piece for piece in self.splitter.split(text) if piece] for text in texts]
        pieces = list(dict.fromkeys(piece for row in cut for piece in row))
        ids = {piece: np.asarray(i, np.int32) for piece, i in zip(pieces, self._tokenize(pieces))}
        return [np.concatenate([np.zeros(0, np.int32), *(ids[piece] for piece in row)]) for row in cut]

    def encode_answers(self, texts: Sequence[str]) -> tuple[np.ndarray, ...]:
        """int32 ids of whole responses, each with `end_id` at its end."""
        return tuple(np.append(ids, np.int32(self.end_id)) for ids in self.encode_texts(texts)) if texts else ()

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens included."""
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def decode_response(self, ids: Sequence[int]) -> str:
        """Text of the ids without special tokens (think tags stay where the tokenizer does not call them special)."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def opening(self) -> str:
        """What the template writes between the user's turn and the first response token."""
        text, bare = self.render(_PROBE), self._template(_probe(), add_generation_prompt=False)
        return text.removeprefix(bare) if text.startswith(bare) else ""

    def _template(self, messages: list[dict[str, str]], add_generation_prompt: bool = True, **options) -> str:
        if self.thinking != "auto":
            options = {"enable_thinking": self.thinking == "on"} | options
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt, **options)

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(
            list(texts), add_special_tokens=False, padding=False, truncation=False, return_attention_mask=False, verbose=False
        )["input_ids"]

    def _end_of_turn(self) -> int | None:
        """The added token that the template writes right after an answer, such as <|im_end|> or <|eot_id|>."""
        answered = self._answered()
        if answered is None or _ANSWER not in answered:
            return None
        ids = self._tokenize([answered.rpartition(_ANSWER)[2].lstrip()])[0]
        return ids[0] if ids and ids[0] in self.tokenizer.added_tokens_decoder else None

    def _answered(self) -> str | None:
        """The template's text of an answered conversation; None where it renders no answers."""
        import jinja2

        try:
            return self._template([*_probe(), {"role": "assistant", "content": _ANSWER}], add_generation_prompt=False)
        except jinja2.TemplateError:
            return None

    def _safe_splitter(self) -> re.Pattern | None:
        added = self.tokenizer.added_tokens_decoder.values()
        names = sorted((t.content for t in added if not t.normalized), key=len, reverse=True)
        if not names or any(t.lstrip or t.rstrip or t.single_word for t in added):
            return None
        splitter = re.compile("(" + "|".join(map(re.escape, names)) + ")")
        # Some tokenizers treat the start of the text differently from the start of a later piece: those show here.
        probes = [self.render(_PROBE), f"{names[0]}{_PROBE}{names[0]} {_PROBE}\n{names[-1]}\n{_PROBE}"]
        pieces = dataclasses.replace(self, splitter=splitter).encode_texts(probes)
        return splitter if [p.tolist() for p in pieces] == self._tokenize(probes) else None


_USE_USER = "put the context into the user's turn: --teacher.placement user (and leave out system texts of the records)"


def _probe() -> list[dict[str, str]]:
    return [{"role": "user", "content": _PROBE}]


def _generation_eos(where: str, revision: str) -> list[int]:
    """eos_token_id of generation_config.json, one or several; empty where there is no such file."""
    from transformers import GenerationConfig

    try:
        eos = GenerationConfig.from_pretrained(where, revision=revision).eos_token_id
    except OSError:
        return []
    return eos if isinstance(eos, list) else [] if eos is None else [eos]


def left_pad(rows: Sequence[Sequence[int]], width: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids ending in the last column, and where they are.

    >>> ids, mask = left_pad([[7, 8], [9]], width=3, pad_id=0)
    >>> ids.tolist(), mask.tolist()
    ([[0, 7, 8], [0, 0, 9]], [[0, 1, 1], [0, 0, 1]])

    Returns:
        ids [B, P] int32 and mask [B, P] int32 (1 = token, 0 = padding), P = width.

    Raises:
        ValueError: a row longer than the width.
    """
    ids = np.full((len(rows), width), pad_id, np.int32)
    mask = np.zeros((len(rows), width), np.int32)
    for b, row in enumerate(rows):
        if len(row) > width:
            raise ValueError(f"row {b} has {len(row)} ids, more than the {width} columns")
        ids[b, width - len(row) :] = row
        mask[b, width - len(row) :] = 1
    return ids, mask


@dataclass(frozen=True)
class Preflight:
    """What the checks found, for the trainer to print and to take its shapes from."""

    sources: list[list["Example"]]
    """The examples of each source, without the prompts that are too long."""
    prompt_width: int
    """P of the student: the room given, or the longest prompt."""
    teacher_width: int
    """P of the teacher."""
    skipped: int
    """Prompts left out because they are longer than their room."""
    opening: str
    """The assistant opening that both prompts end with."""
    stop_ids: tuple[int, ...]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        sizes = " + ".join(str(len(examples)) for examples in self.sources)
        lines = [
            f"{sizes} prompts of up to {self.prompt_width} tokens, {self.teacher_width} for the teacher; {self.skipped} too long, left out",
            f"responses begin after {self.opening!r} and end at token {' or '.join(map(str, self.stop_ids))}",
        ]
        return "\n".join(lines + [f"note: {w}" for w in self.warnings])


def preflight(
    student: Chat,
    teacher: Chat,
    sources: Sequence[Sequence["Example"]],
    vocab_size: int,
    prompt_room: int = 0,
    teacher_room: int = 0,
    long_prompts: Literal["error", "skip"] = "error",
) -> Preflight:
    """Everything about the prompts that can be known wrong before the first compilation.

    Args:
        student, teacher: Their templates; the same object where the teacher is the student with a context.
        sources: Encoded examples of each source (`pipeline.encode_all`).
        vocab_size: Rows of the embedding.
        prompt_room, teacher_room: Tokens a templated prompt may have; 0 takes the longest.
        long_prompts: `error`, or `skip` to leave such prompts out and count them.

    Raises:
        UserError: no stop token; an id outside the vocabulary; a teacher with another tokenizer; prompts of student and teacher that
            end differently; a template that rewrites the prompt once it is answered; a prompt longer than its room; a source with
            nothing left.
    """
    if not sources:
        raise UserError("there are no prompts; give --data.sources at least one source with records")
    _check_ids(student, sources, vocab_size)
    check_same_tokens(student, teacher)
    warnings = [w for chat in {id(c): c for c in (student, teacher)}.values() for w in _check_template(chat)]
    _check_boundary(student, teacher, sources)
    fitting, skipped = [], 0
    for examples in sources:
        kept = [e for e in examples if _fits(e, prompt_room, teacher_room, long_prompts)]
        skipped += len(examples) - len(kept)
        if not kept:
            name = f"source {examples[0].record.source}" if examples else "a source"
            flags = "--data.max-prompt-tokens and --data.max-teacher-prompt-tokens"
            raise UserError(f"{name} has no prompt that fits; raise {flags}, or set them to 0")
        fitting.append(kept)
    everything = [e for examples in fitting for e in examples]
    return Preflight(
        sources=fitting,
        prompt_width=prompt_room or max(len(e.prompt_ids) for e in everything),
        teacher_width=teacher_room or max(len(e.teacher_ids) for e in everything),
        skipped=skipped,
        opening=student.opening(),
        stop_ids=student.stop_ids,
        warnings=tuple(warnings),
    )


def _check_ids(chat: Chat, sources: Sequence[Sequence["Example"]], vocab_size: int) -> None:
    if not chat.stop_ids:
        raise UserError(f"{chat.path!r} names no token that ends a response; set eos_token in its tokenizer_config.json")
    used = {*chat.tokenizer.all_special_ids, *chat.stop_ids, chat.pad_id}
    used.update(int(max(e.prompt_ids.max(), e.teacher_ids.max())) for examples in sources for e in examples)
    if max(used) >= vocab_size:
        name = chat.tokenizer.convert_ids_to_tokens(max(used)) or "unnamed"
        raise UserError(
            f"token {name!r} of {chat.path!r} has id {max(used)}, but the model has only {vocab_size} embedding rows; "
            "use the tokenizer that belongs to the checkpoint"
        )


def check_same_tokens(student: Chat, teacher: Chat) -> None:
    """Student and teacher are compared id by id, so every id must mean the same to both."""
    if student is teacher:
        return
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    for token in [*ours, *theirs]:
        if ours.get(token) != theirs.get(token):
            raise UserError(
                f"token {token!r} has id {ours.get(token, 'none')} for the student {student.path!r} and {theirs.get(token, 'none')} for "
                f"the teacher {teacher.path!r}; distillation needs one tokenizer, so use a teacher of the student's family"
            )


def _check_template(chat: Chat) -> list[str]:
    """An answered conversation must begin with the prompt as it was before the answer; think blocks may be stripped."""
    warnings = []
    if chat.ignores_switch and not chat.closes_think:
        warnings.append(f"the chat template of {chat.path!r} has no reasoning switch: thinking={chat.thinking} changes nothing")
    answered, prompt = chat._answered(), chat.render(_PROBE)
    if answered is None or answered.startswith(prompt):
        return warnings
    if "<think>" in prompt and answered.startswith(prompt[: prompt.rindex("<think>")]):
        without = "leaves the think block of the prompt out of answered turns (training never re-renders them)"
        return [*warnings, f"the chat template of {chat.path!r} {without}"]
    raise UserError(
        f"the chat template of {chat.path!r} rewrites the prompt once it is answered "
        f"({prompt[-40:]!r} becomes {answered[-60:]!r}); use a template that only appends"
    )


def _check_boundary(student: Chat, teacher: Chat, sources: Sequence[Sequence["Example"]]) -> None:
    """Both prompts must end with the student's assistant opening, or the first response token would follow different text."""
    n = max(1, len(student.encode_texts([student.opening()])[0])) if student.opening() else 1
    for e in (e for examples in sources for e in examples):
        ours, theirs = e.prompt_ids[-n:].tolist(), e.teacher_ids[-n:].tolist()
        if ours != theirs:
            raise UserError(
                f"prompt {e.id!r} of {e.record.source} ends with {student.decode(ours)!r} for the student and with "
                f"{teacher.decode(theirs)!r} for the teacher; give both the same chat template and the same --model.thinking"
            )


def _fits(e: "Example", prompt_room: int, teacher_room: int, long_prompts: str) -> bool:
    for ids, room, flag in ((e.prompt_ids, prompt_room, "max-prompt-tokens"), (e.teacher_ids, teacher_room, "max-teacher-prompt-tokens")):
        if room and len(ids) > room:
            if long_prompts == "skip":
                return False
            raise UserError(
                f"prompt {e.id!r} of {e.record.source} has {len(ids)} tokens, more than --data.{flag} {room}; "
                "raise it (0 takes the longest), or leave such prompts out with --data.long-prompts skip"
            )
    return True
