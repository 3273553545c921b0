"""CSV files of plots' data, and the check that a folder can be written."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opsa_jax.errors import UserError


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows under the union of their names, in the order in which they first occur; empty where a row has no such value.

    >>> csv_text([{"a": 1}, {"a": 2, "b": "x,y"}])
    'a,b\\n1,\\n2,"x,y"\\n'
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """`csv_text` into a file, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(csv_text(rows), encoding="utf-8")
    temporary.replace(path)


def check_writable(folder: Path) -> None:
    """Leaves nothing behind.

    Raises:
        UserError: the folder cannot be made or written.
    """
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write"
        probe.touch()
        probe.unlink()
        for path in made:
            path.rmdir()
    except OSError as e:
        raise UserError(f"{folder} cannot be written: {e.strerror}; choose another with --out") from None
