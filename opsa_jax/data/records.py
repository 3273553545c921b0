"""One prompt of a run, and the check that turns a row of any file into it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from opsa_jax.config import SourceConfig
from opsa_jax.errors import did_you_mean

LABELS = ("harmful", "benign")


class BadRecord(Exception):
    """A row that cannot become a `Record`: what is wrong, without the place. Loaders add the place and report or skip it."""


@dataclass(frozen=True)
class Record:
    """A prompt with what the run knows about it; every text is a `str`, absent ones are empty."""

    id: str
    """Unique within its source: the id field, or the record's number in the source (from 0, before any filter)."""
    prompt: str
    """The user's text."""
    label: str
    """`harmful` or `benign`; chooses the teacher's context."""
    category: str = ""
    response: str = ""
    """A given response; the chosen one of a preference pair."""
    rejected: str = ""
    """The rejected response of a preference pair."""
    teacher: str = ""
    """Route: the name of the teacher that supervises this record, where there are several."""
    system: str = ""
    """A system message of the record's own (field `system`)."""
    source: str = ""
    """`SourceConfig.path` as the user wrote it."""
    line: int = 0
    """Line of a text file, or number of the row, from 1."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """All other fields, as the file has them; evaluation sets use them."""


def make_record(row: Mapping[str, Any], source: SourceConfig, number: int, line: int) -> Record:
    """The record in `row`, read by the field names of `source`.

    Raises:
        BadRecord: missing, empty or non-text prompt; missing or unknown label; a text field that holds a list or an object.
    """
    used = {
        source.prompt_field,
        source.category_field,
        source.id_field,
        source.response_field,
        source.rejected_field,
        source.teacher_field,
        "system",
        *(() if source.label else (source.label_field,)),
    }
    return Record(
        id=_text(row, source.id_field) or str(number),
        prompt=_prompt(row, source.prompt_field),
        label=source.label or _label(row, source.label_field),
        category=_text(row, source.category_field),
        response=_text(row, source.response_field),
        rejected=_text(row, source.rejected_field),
        teacher=_text(row, source.teacher_field),
        system=_text(row, "system"),
        source=source.path,
        line=line,
        extra={k: v for k, v in row.items() if k not in used},
    )


def plain(value: Any) -> str | None:
    """A scalar as text (JSON's `true`, not Python's `True`); None for what is not a scalar."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else None


def _text(row: Mapping[str, Any], name: str) -> str:
    """An optional field: empty where it is absent or null."""
    value = row.get(name)
    text = "" if value is None else plain(value)
    if text is None:
        raise BadRecord(f"field {name!r} must be text, not {type(value).__name__}")
    return text


def _prompt(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        raise BadRecord(f"no field {name!r} (the source's prompt_field){did_you_mean(name, row)}")
    value = row[name]
    if not isinstance(value, str):
        raise BadRecord(f"field {name!r} must be text, not {'null' if value is None else type(value).__name__}")
    if not value.strip():
        raise BadRecord(f"field {name!r} is empty; a prompt needs some text")
    return value


def _label(row: Mapping[str, Any], name: str) -> str:
    allowed = ", ".join(LABELS)
    if name not in row:
        raise BadRecord(f"no field {name!r} (the source's label_field){did_you_mean(name, row)}; or give the source a label: {allowed}")
    if row[name] not in LABELS:
        raise BadRecord(f"field {name!r} is {str(row[name])[:60]!r}; allowed: {allowed}")
    return row[name]
