"""A file of responses that grows line by line and survives being stopped at any moment."""

import json
import os
from pathlib import Path
from typing import Any

from opsa_jax.errors import UserError

_ELSE = "choose another --out"


class RowFile:
    """JSON lines, each written by one call, with the settings they were made with in a file beside it (`NAME.settings.json`).

    A line is known by its `id` and `sample`. Resuming drops an unfinished last line and tells which rows are there.

    Args:
        path: the file; its folder is made.
        settings: what determines the rows; on resuming it must be what it was.
        resume: continue an existing file. A missing one is begun in both cases.

    Raises:
        UserError: the file exists without `resume`, was made with other settings, or holds lines that are not such rows.
    """

    def __init__(self, path: Path, settings: dict[str, Any], resume: bool):
        self._path = path
        beside = path.with_name(f"{path.name}.settings.json")
        self.done: set[tuple[str, int]] = set()
        """(id, sample) of the rows in the file."""
        if path.exists():
            if not resume:
                raise UserError(f"{path} exists; continue it with --resume, remove it, or choose another --out")
            self._check_settings(beside, settings)
            self._read()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def append(self, row: dict[str, Any]) -> None:
        os.write(self._file, (json.dumps(row, ensure_ascii=False) + "\n").encode())
        self.done.add((row["id"], row["sample"]))

    def close(self) -> None:
        os.close(self._file)

    def _check_settings(self, beside: Path, settings: dict[str, Any]) -> None:
        if not beside.exists():
            raise UserError(f"{self._path} cannot be continued: {beside.name}, which says how it was made, is missing; {_ELSE}")
        before = json.loads(beside.read_text(encoding="utf-8"))
        for name in sorted(before.keys() | settings.keys()):
            if (old := before.get(name)) != (new := settings.get(name)):
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{self._path} was made with {flag} {old!r}, not {new!r}; continue it with the same settings, or {_ELSE}")

    def _read(self) -> None:
        data = self._path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self._path, whole)
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
                self.done.add((row["id"], row["sample"]))
            except (ValueError, TypeError, KeyError):
                raise UserError(f"{self._path}, line {number} is not a row with id and sample; mend or remove it, or {_ELSE}") from None
