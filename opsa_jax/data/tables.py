"""Files as tables of rows: .jsonl, .jsonl.gz, .csv, .tsv, .parquet, .arrayrecord, and prepared TFDS sets.

Every table has a `name` and a `unit` for messages, a length, `row(i)` (a dict; raises `BadRecord`) and `line(i)` (where that is, from 1).
Rows are decoded when they are asked for; formats with random access are read from disk then, too.
"""

import bisect
import csv
import functools
import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from opsa_jax.data.records import BadRecord
from opsa_jax.errors import UserError, did_you_mean


class Table(Protocol):
    """What the loaders need to know of a file."""

    name: str
    unit: str

    def __len__(self) -> int: ...

    def row(self, i: int) -> dict[str, Any]: ...

    def line(self, i: int) -> int: ...


class Jsonl:
    """One JSON object per line, UTF-8, blank lines ignored; .gz is decompressed."""

    unit = "line"

    def __init__(self, path: Path):
        self.name = str(path)
        data = path.read_bytes()
        if path.suffix == ".gz":
            try:
                data = gzip.decompress(data)
            except (OSError, EOFError) as e:
                raise UserError(f"{path} is not a whole gzip file ({e}); download or compress it again") from None
        # Not splitlines(): JSON strings may hold U+2028 and friends, which are not line ends here.
        self._lines = [(n, line) for n, line in enumerate(data.split(b"\n"), 1) if line.strip()]

    def __len__(self) -> int:
        return len(self._lines)

    def row(self, i: int) -> dict[str, Any]:
        return _json_object(self._lines[i][1])

    def line(self, i: int) -> int:
        return self._lines[i][0]


class Csv:
    """Comma- or tab-separated values with a header, UTF-8; quoted cells may hold line ends."""

    unit = "line"

    def __init__(self, path: Path):
        self.name = str(path)
        data = path.read_bytes()
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as e:
            raise UserError(f"{path}, line {data[: e.start].count(10) + 1}: not UTF-8 text; save the file as UTF-8") from None
        reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        rows, start = [], 1
        try:
            for cells in reader:
                if cells:
                    rows.append((start, cells))
                start = reader.line_num + 1
        except csv.Error as e:
            raise UserError(f"{path}, line {start}: {e}; cells with quotes or line ends must be quoted, their quotes doubled") from None
        self._header = rows[0][1] if rows else []
        self._rows = rows[1:]

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, i: int) -> dict[str, Any]:
        cells = self._rows[i][1]
        if len(cells) != len(self._header):
            raise BadRecord(f"{len(cells)} cells where the header has {len(self._header)} ({', '.join(self._header)})")
        return dict(zip(self._header, cells))

    def line(self, i: int) -> int:
        return self._rows[i][0]


class Parquet:
    """Row groups are read when a row of theirs is asked for; the last two stay in memory."""

    unit = "row"
    _BLOCK = 64  # rows turned into Python objects at a time

    def __init__(self, path: Path):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.name = str(path)
        try:
            self._file = pq.ParquetFile(path)
        except pa.ArrowInvalid as e:
            raise UserError(f"{path} is not a Parquet file ({str(e).splitlines()[0]})") from None
        meta = self._file.metadata
        self._starts = [0]
        for group in range(meta.num_row_groups):
            self._starts.append(self._starts[-1] + meta.row_group(group).num_rows)
        self._group = functools.lru_cache(2)(self._file.read_row_group)
        self._block = functools.lru_cache(4)(self._read_block)

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, i: int) -> dict[str, Any]:
        group = bisect.bisect_right(self._starts, i) - 1
        block, offset = divmod(i - self._starts[group], self._BLOCK)
        return dict(self._block(group, block)[offset])

    def _read_block(self, group: int, block: int) -> list[dict[str, Any]]:
        return self._group(group).slice(block * self._BLOCK, self._BLOCK).to_pylist()

    def line(self, i: int) -> int:
        return i + 1


class ArrayRecord:
    """Each record is one JSON object, UTF-8."""

    unit = "record"

    def __init__(self, path: Path):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.name = str(path)
        try:
            self._records = ArrayRecordDataSource(str(path))
        except Exception as e:  # the reader raises whatever its C++ side reports
            raise UserError(f"{path} is not an ArrayRecord file ({str(e).splitlines()[0]})") from None

    def __len__(self) -> int:
        return len(self._records)

    def row(self, i: int) -> dict[str, Any]:
        return _json_object(self._records[i])

    def line(self, i: int) -> int:
        return i + 1


class Tfds:
    """A prepared TensorFlow Datasets set in array_record (or another random-access) format; TensorFlow is not needed.

    It is looked for in $TFDS_DATA_DIR (default ~/tensorflow_datasets). Text is decoded, class labels become their names.
    """

    unit = "record"

    def __init__(self, name: str, split: str):
        import tensorflow_datasets as tfds

        self.name = f"tfds:{name}[{split}]"
        folder = os.environ.get("TFDS_DATA_DIR")
        try:
            self._records = tfds.data_source(
                name, split=split, data_dir=folder, download=False, builder_kwargs={"file_format": "array_record"}
            )
        except Exception as e:  # tfds raises many kinds, from KeyError to AssertionError, for a set that is not there
            raise UserError(
                f"{self.name} cannot be read from {folder or '~/tensorflow_datasets'}: {_first_line(e)}; "
                f"prepare it there with `tfds build {name} --file_format=array_record`, or point TFDS_DATA_DIR to it"
            ) from e
        features = self._records.dataset_info.features
        self._names = {k: f.int2str for k, f in features.items() if isinstance(f, tfds.features.ClassLabel) and f.names}

    def __len__(self) -> int:
        return len(self._records)

    def row(self, i: int) -> dict[str, Any]:
        try:
            row = _decoded(self._records[i])
        except UnicodeDecodeError as e:
            raise BadRecord(f"a text is not UTF-8 ({e.reason})") from None
        return {k: self._names[k](v) if k in self._names and v >= 0 else v for k, v in row.items()}

    def line(self, i: int) -> int:
        return i + 1


# The order is a preference: where a hub dataset holds the same split in several formats, the first one is read.
READERS: dict[str, Callable[[Path], Table]] = {
    ".parquet": Parquet,
    ".arrayrecord": ArrayRecord,
    ".jsonl": Jsonl,
    ".jsonl.gz": Jsonl,
    ".csv": Csv,
    ".tsv": Csv,
}


def suffix_of(name: str) -> str | None:
    """The entry of `READERS` that `name` ends with, or None."""
    return next((s for s in READERS if name.endswith(s)), None)


def open_table(path: Path) -> Table:
    """The table in a file.

    Raises:
        UserError: missing file (with the nearest name in its folder), unknown suffix, unreadable content.
    """
    suffix = suffix_of(path.name)
    if not path.is_file():
        if not path.parent.is_dir():
            raise UserError(f"no file {str(path)!r}: there is no folder {str(path.parent)!r}")
        near = [p.name for p in path.parent.iterdir() if suffix_of(p.name)]
        raise UserError(f"no file {str(path)!r}{did_you_mean(path.name, near) if near else '; its folder has no data files'}")
    if suffix is None:
        raise UserError(f"{path}: unknown kind of file; allowed: {', '.join(READERS)}, hf:NAME, tfds:NAME, sandbox:FILE")
    return READERS[suffix](path)


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        row = json.loads(data.decode("utf-8-sig"))
    except json.JSONDecodeError as e:
        raise BadRecord(f"not valid JSON ({e.msg} at character {e.pos + 1})") from None
    except UnicodeDecodeError:
        raise BadRecord("not UTF-8 text") from None
    if not isinstance(row, dict):
        raise BadRecord(f"a JSON object with named fields is needed, not {type(row).__name__}")
    return row


def _decoded(value: Any) -> Any:
    """What TFDS yields, with text as `str` and arrays as lists."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {k: _decoded(v) for k, v in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
        return [_decoded(v) for v in value] if isinstance(value, list) else _decoded(value)
    return [_decoded(v) for v in value] if isinstance(value, list | tuple) else value


def _first_line(e: Exception) -> str:
    return next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
