"""Constitutions: one text per harm category that only a teacher sees (COPSD, arXiv 2606.03089).

Every text tells the model to check the risk silently and to take one of three paths: A refuse, say why and redirect; B warn, then guide
safely; C just help; and to leave no trace of the protocol in the answer. The texts are our own. A constitution is a JSON file:

    {"frame": "... {rule} ...", "default": "...", "general": "", "categories": {"privacy": "..."}}

`default` serves harmful prompts whose category has no text, `general` benign prompts (empty: they get the default). `frame` is optional;
the other texts are put in place of its {rule}.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Literal

from opsa_jax import paths
from opsa_jax.data.records import Record
from opsa_jax.errors import UserError, did_you_mean

General = Literal["default", "none"]
_FIELDS = ("frame", "default", "general", "categories")


@dataclass(frozen=True)
class Constitution:
    """Texts by category, whole (the frame is already around them)."""

    default: str = ""
    """For harmful prompts of a category without a text; empty for none."""
    general: str = ""
    """For benign prompts; empty: the default."""
    categories: Mapping[str, str] = field(default_factory=dict)
    """Text by category, as `category_key` writes it."""
    name: str = ""
    """Where it comes from, for messages."""

    def text(self, category: str, label: str, general: General = "default", *, strict: bool = True, record: str = "") -> str:
        """The text for a prompt; empty for none.

        Args:
            category: the record's; upper case, spaces and underscores do not matter.
            label: `harmful` or `benign`.
            general: what benign prompts get: `default`, the general text (the default text where there is none), or `none`.
            strict: a harmful prompt for which there is neither a category's text nor a default is an error; otherwise it gets none.
            record: the record's id, for the message.

        Raises:
            UserError: constitution without the needed category.
        """
        if label != "harmful":
            return "" if general == "none" else self.general or self.default
        found = self.categories.get(category_key(category)) or self.default
        if strict and not found:
            hint = did_you_mean(category_key(category), self.categories) if self.categories else ""
            raise UserError(
                f"constitution without the needed category: record {record or '(without id)'} is of category {category!r}, and "
                f"{self.name} has no text for it and no default{hint}; add one of them to the file"
            )
        return found

    def texts(self, records: Iterable[Record], general: General = "default", *, strict: bool = True, masked: float = 0.0) -> list[str]:
        """The text of each record, masked (empty) for a share of the harmful ones.

        Raises:
            UserError: constitution without a needed category, or a share outside [0, 1].
        """
        if not 0 <= masked <= 1:
            raise UserError(f"masked share {masked:g} of the constitution: must be between 0 and 1")
        return [
            "" if r.label == "harmful" and is_masked(r, masked) else self.text(r.category, r.label, general, strict=strict, record=r.id)
            for r in records
        ]


def category_key(category: str) -> str:
    """A category as constitutions name it.

    >>> category_key("Self_harm "), category_key("Hate  Speech")
    ('self-harm', 'hate-speech')
    """
    return "-".join(category.lower().replace("_", " ").replace("-", " ").split())


def is_masked(record: Record, share: float) -> bool:
    """Whether this record is one of the stated share that goes without the constitution (COPSD: 0.15 of the safety prompts).

    Decided by a hash of id and prompt: the same on every host, in every epoch and for every order of the records, and a record masked
    at one share is masked at every larger one.
    """
    digest = hashlib.sha256(json.dumps([record.id, record.prompt]).encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def load_constitution(value: str) -> Constitution:
    """A constitution by `@default` (ours, for real harm categories), `@sandbox` (for the embedded world) or `file:PATH`.

    Raises:
        UserError: unknown name, unreadable file, or one that is not a constitution.
    """
    scheme, _, name = value.partition(":")
    if scheme == "file" and name:
        file = Path(name).expanduser()
    elif value == "@default":
        file = Path(str(resources.files("opsa_jax.teachers"))) / "constitution.json"
    elif value == "@sandbox":
        file = paths.resolve("sandbox:constitution.json")
    else:
        raise UserError(f"no constitution {value!r}; allowed: @default, @sandbox, or file:PATH of a JSON file")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"constitution {file} cannot be read as JSON: {e}") from None
    return _checked(content, str(file) if scheme == "file" else value)


def _checked(content, name: str) -> Constitution:
    def fail(why: str):
        raise UserError(f"constitution {name}: {why}; it must hold default, general, categories (texts by category) and perhaps frame")

    if not isinstance(content, dict):
        fail(f"a JSON {type(content).__name__} instead of an object")
    if unknown := sorted(content.keys() - set(_FIELDS)):
        fail(f"unknown field {unknown[0]!r}{did_you_mean(unknown[0], _FIELDS)}")
    categories = content.get("categories", {})
    if not isinstance(categories, dict):
        fail(f"categories must be an object, not {type(categories).__name__}")
    texts = {k: content.get(k, "") for k in ("frame", "default", "general")} | {f"categories.{k}": v for k, v in categories.items()}
    for where, text in texts.items():
        if not isinstance(text, str):
            fail(f"{where} must be text, not {type(text).__name__}")
    frame = texts["frame"] or "{rule}"
    if "{rule}" not in frame:
        fail("frame does not say {rule} where the other texts go")

    def framed(text: str) -> str:
        return frame.replace("{rule}", text.strip()).strip() if text.strip() else ""

    by_key: dict[str, str] = {}
    for category, text in categories.items():
        if category_key(category) in by_key:
            fail(f"category {category!r} is there twice")
        by_key[category_key(category)] = framed(text)
    if not texts["default"].strip() and not any(by_key.values()):
        fail("neither a default nor a category has a text")
    return Constitution(framed(texts["default"]), framed(texts["general"]), by_key, name)
