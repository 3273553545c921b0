"""From a `SourceConfig` to records: any supported file or dataset, filtered, labelled, validated row by row."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from opsa_jax import paths
from opsa_jax.config import SourceConfig
from opsa_jax.data.hub import split_files
from opsa_jax.data.records import LABELS, BadRecord, Record, make_record, plain
from opsa_jax.data.tables import Table, Tfds, open_table
from opsa_jax.errors import UserError, did_you_mean


class Records(Sequence[Record]):
    """The records of one source, in file order. A record is made from its row when it is asked for."""

    def __init__(self, source: SourceConfig, kept: list[tuple[Table, int, int]]):
        self.source = source
        self._kept = kept  # (table, row in it, number in the source)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        table, row, number = self._kept[i]
        return make_record(table.row(row), self.source, number, table.line(row))


def load_source(source: SourceConfig, bad_records: Literal["error", "skip"] = "error") -> tuple[Records, int]:
    """Open a source and check every row of it.

    Args:
        source: Where, which rows (`where`, `limit`), and the names of the fields.
        bad_records: `error` stops at the first malformed row; `skip` leaves such rows out.

    Returns:
        The records, and how many malformed rows were skipped.

    Raises:
        UserError: missing or unreadable file or dataset; malformed row (file, line, field); nothing left.
    """
    _check(source)
    field, _, value = source.where.partition("=")
    kept: list[tuple[Table, int, int]] = []
    skipped, number, first_problem = 0, 0, ""
    columns: set[str] = set()
    tables = _open(source)
    for table, i in ((t, i) for t in tables for i in range(len(t))):
        if source.limit and len(kept) == source.limit:
            break
        number += 1
        try:
            row = table.row(i)
            if source.where:
                columns.update(row)
                if field not in row or plain(row[field]) != value:
                    continue
            make_record(row, source, number - 1, table.line(i))
        except BadRecord as e:
            problem = f"{table.name}, {table.unit} {table.line(i)}: {e}"
            if bad_records == "error":
                raise UserError(f"{problem}; mend it, or skip such records with --data.bad-records skip") from None
            skipped, first_problem = skipped + 1, first_problem or problem
        else:
            kept.append((table, i, number - 1))
    if not kept:
        raise UserError(_why_empty(source, number, columns, skipped, first_problem))
    return Records(source, kept), skipped


def _check(source: SourceConfig) -> None:
    if source.label and source.label not in LABELS:
        raise UserError(f"source {source.path}: label {source.label!r} is not allowed; allowed: {', '.join(LABELS)}")
    if source.where and not source.where.partition("=")[1]:
        raise UserError(f"source {source.path}: where {source.where!r} must be written FIELD=VALUE, for example label=harmful")
    if source.limit < 0:
        raise UserError(f"source {source.path}: limit {source.limit} must be 0 (all) or a number of records")


def _open(source: SourceConfig) -> list[Table]:
    scheme, _, name = source.path.partition(":")
    if scheme == "hf":
        return [open_table(path) for path in split_files(name, source.split)]
    if scheme == "tfds":
        return [Tfds(name, source.split)]
    return [open_table(paths.resolve(source.path).expanduser())]


def _why_empty(source: SourceConfig, number: int, columns: set[str], skipped: int, first_problem: str) -> str:
    if number == 0:
        return f"source {source.path} has no records"
    if skipped:
        return f"source {source.path} has no usable record: {skipped} of {number} were malformed; the first: {first_problem}"
    field = source.where.partition("=")[0]
    hint = "" if field in columns else f": there is no field {field!r}{did_you_mean(field, columns)}"
    return f"source {source.path}: none of its {number} records has {source.where}{hint}"


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line; the file appears whole or not at all. Folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
