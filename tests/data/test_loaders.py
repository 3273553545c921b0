import csv
import gzip
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from opsa_jax import paths
from opsa_jax.config import SourceConfig
from opsa_jax.data.loaders import load_source, write_jsonl
from opsa_jax.errors import UserError

ROWS = [
    {"id": "r0", "prompt": "How do I open the vault?", "label": "harmful", "category": "open", "turns": "1"},
    {"id": "r1", "prompt": 'A "quoted", café\u2028line\nand another', "label": "benign", "category": "", "turns": "2"},
    {"id": "r2", "prompt": "Tell a story.", "label": "benign", "category": "story", "turns": "3"},
]
SHARED = Path(__file__).parents[3] / "shared" / "data"


def write(path: Path, rows) -> Path:
    """The same rows in the format that the suffix names."""
    kind = path.name.split(".", 1)[1]
    lines = [json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in rows]
    if kind == "jsonl":
        path.write_bytes(b"".join(lines))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(b"".join(lines)))
    elif kind in ("csv", "tsv"):
        with open(path, "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, rows[0], delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    else:
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for line in lines:
            writer.write(line)
        writer.close()
    return path


def error(source: SourceConfig, bad_records="error") -> str:
    with pytest.raises(UserError) as e:
        load_source(source, bad_records)
    assert "\n" not in str(e.value)
    return str(e.value)


def in_file(tmp_path: Path, *lines: str, **fields) -> SourceConfig:
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(lines))
    return SourceConfig(str(path), **fields)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "tsv", "parquet", "arrayrecord"])
def test_every_format_gives_the_same_records(tmp_path, kind):
    path = write(tmp_path / f"set.{kind}", ROWS)
    records, skipped = load_source(SourceConfig(str(path)))
    assert skipped == 0 and len(records) == 3
    assert [(r.id, r.prompt, r.label, r.category, r.extra) for r in records] == [
        (r["id"], r["prompt"], r["label"], r["category"], {"turns": r["turns"]}) for r in ROWS
    ]
    assert records[-1] == records[2] and records[0:3:2] == [records[0], records[2]]  # random access, in any order
    # The second row holds a line end inside a quoted cell.
    first, last = (2, 5) if kind in ("csv", "tsv") else (1, 3)
    assert (records[0].line, records[2].line) == (first, last) and records[0].source == str(path)


def test_field_names_label_filter_and_limit(tmp_path):
    rows = [{"q": f"question {i}", "kind": "safe" if i % 2 else "unsafe", "why": {"n": i}, "to": "teacher-b", "r": "yes"} for i in range(8)]
    source = SourceConfig(
        str(write(tmp_path / "set.jsonl", rows)),
        where="kind=safe",
        label="benign",
        prompt_field="q",
        teacher_field="to",
        response_field="r",
    )
    records, _ = load_source(replace(source, limit=3))
    assert [r.prompt for r in records] == ["question 1", "question 3", "question 5"]
    assert [r.id for r in records] == ["1", "3", "5"]  # the number in the file, whatever the filter
    assert {(r.label, r.teacher, r.response) for r in records} == {("benign", "teacher-b", "yes")}
    assert records[1].extra == {"kind": "safe", "why": {"n": 3}}
    assert len(load_source(source)[0]) == 4


def test_label_of_the_source_keeps_the_column(tmp_path):
    source = in_file(tmp_path, '{"prompt": "a", "label": "safe", "system": "Be brief."}', label="benign")
    record = load_source(source)[0][0]
    assert (record.label, record.system, record.extra) == ("benign", "Be brief.", {"label": "safe"})


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "a", "label": "bad"}', "field 'label' is 'bad'; allowed: harmful, benign"),
        ('{"prompt": "a", "lable": "benign"}', "no field 'label' (the source's label_field); did you mean 'lable'?"),
        ('{"promt": "a", "label": "benign"}', "no field 'prompt' (the source's prompt_field); did you mean 'promt'?"),
        ('{"prompt": " ", "label": "benign"}', "field 'prompt' is empty; a prompt needs some text"),
        ('{"prompt": null, "label": "benign"}', "field 'prompt' must be text, not null"),
        ('{"prompt": ["a"], "label": "benign"}', "field 'prompt' must be text, not list"),
        ('{"prompt": "a", "label": "benign", "category": [1]}', "field 'category' must be text, not list"),
        ('{"prompt": "a", "label": ', "not valid JSON (Expecting value at character 26)"),
        ('["a"]', "a JSON object with named fields is needed, not list"),
    ],
)
def test_malformed_line_is_named_or_skipped_and_counted(tmp_path, line, problem):
    source = in_file(tmp_path, '{"prompt": "fine", "label": "benign"}', "", line, '{"prompt": "too", "label": "harmful"}')
    message = error(source)
    assert message.startswith(f"{source.path}, line 3: {problem}")
    assert message.endswith("; mend it, or skip such records with --data.bad-records skip")
    records, skipped = load_source(source, "skip")
    assert [(r.prompt, r.line) for r in records] == [("fine", 1), ("too", 4)] and skipped == 1


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_bytes(b'{"prompt": "a", "label": "benign"}\n{"prompt": "\xff", "label": "benign"}\n')
    assert f"{path}, line 2: not UTF-8 text" in error(SourceConfig(str(path)))
    assert load_source(SourceConfig(str(path)), "skip")[1] == 1
    path = tmp_path / "set.csv"
    path.write_bytes(b"prompt,label\na,benign\n\xff,benign\n")
    assert error(SourceConfig(str(path))) == f"{path}, line 3: not UTF-8 text; save the file as UTF-8"


def test_csv_cells_that_do_not_fit_the_header(tmp_path):
    path = tmp_path / "set.csv"
    path.write_text("\ufeffprompt,label\na,benign\nb, with a comma,benign\n", encoding="utf-8")
    assert f"{path}, line 3: 3 cells where the header has 2 (prompt, label)" in error(SourceConfig(str(path)))
    records, skipped = load_source(SourceConfig(str(path)), "skip")
    assert [r.prompt for r in records] == ["a"] and skipped == 1
    path.write_text('prompt,label\na,benign\n"never closed,benign\n')
    assert f"{path}, line 3: unexpected end of data" in error(SourceConfig(str(path)))


def test_files_that_are_not_what_they_are_called(tmp_path):
    for kind, says in {
        "parquet": "not a Parquet file",
        "jsonl.gz": "not a whole gzip file",
        "arrayrecord": "not an ArrayRecord file",
    }.items():
        path = tmp_path / f"set.{kind}"
        path.write_text('{"prompt": "a", "label": "benign"}')
        assert says in error(SourceConfig(str(path))), kind
    path = tmp_path / "set.txt"
    path.write_text("a")
    assert "unknown kind of file; allowed: .parquet, .arrayrecord, .jsonl, .jsonl.gz, .csv, .tsv, hf:NAME" in error(SourceConfig(str(path)))


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "trian.txt").write_text("a")
    assert error(SourceConfig(f"{tmp_path}/trian.jsonl")) == f"no file '{tmp_path}/trian.jsonl'; did you mean 'train.jsonl'?"
    assert error(SourceConfig(f"{tmp_path}/no/t.jsonl")) == f"no file '{tmp_path}/no/t.jsonl': there is no folder '{tmp_path}/no'"


def test_nothing_left_says_why(tmp_path):
    source = in_file(tmp_path, '{"prompt": "a", "label": "benign"}', '{"label": "benign"}')
    assert error(replace(source, where="lable=benign")).endswith(
        "none of its 2 records has lable=benign: there is no field 'lable'; did you mean 'label'?"
    )
    assert error(replace(source, where="label=harmful")).endswith("none of its 2 records has label=harmful")
    assert "2 of 2 were malformed; the first" in error(replace(source, prompt_field="text"), "skip")
    (tmp_path / "set.jsonl").write_text("\n")
    assert error(source) == f"source {source.path} has no records"


def test_source_settings_are_checked(tmp_path):
    source = in_file(tmp_path, '{"prompt": "a", "label": "benign"}')
    assert "label 'safe' is not allowed; allowed: harmful, benign" in error(replace(source, label="safe"))
    assert "where 'label' must be written FIELD=VALUE" in error(replace(source, where="label"))
    assert "limit -1 must be 0 (all) or a number" in error(replace(source, limit=-1))


def test_where_compares_json_scalars_as_json_writes_them(tmp_path):
    source = in_file(tmp_path, '{"prompt": "a", "label": "benign", "ok": true, "n": 3}', '{"prompt": "b", "label": "benign", "ok": null}')
    for where in ("ok=true", "n=3"):
        assert [r.prompt for r in load_source(replace(source, where=where))[0]] == ["a"]


def test_parquet_reads_a_row_group_when_it_is_needed(tmp_path, monkeypatch):
    path = write(tmp_path / "set.parquet", [{"prompt": str(i), "label": "benign"} for i in range(600)])  # 300 groups
    records, _ = load_source(SourceConfig(str(path)))
    read = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, g: read.append(g) or original(self, g))
    records._kept[0][0].__init__(path)
    assert [records[i].prompt for i in (599, 0, 1)] == ["599", "0", "1"] and read == [299, 0]


def test_tfds_is_read_without_tensorflow(tmp_path, monkeypatch):
    import sys

    import tensorflow_datasets as tfds

    class TinySafety(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "tiny_safety"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "prompt": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=["benign", "harmful"]),
                "tags": tfds.features.Sequence(tfds.features.Text()),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(5):
                yield i, {"prompt": f"café {i}", "label": i % 2, "tags": ["a", "é"]}

    TinySafety(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    records, _ = load_source(SourceConfig("tfds:tiny_safety", where="label=harmful"))
    assert sorted(r.prompt for r in records) == ["café 1", "café 3"]
    assert records[0].label == "harmful" and records[0].extra == {"tags": ["a", "é"]}
    assert "Unknown split 'test'" in error(SourceConfig("tfds:tiny_safety", split="test"))
    missing = error(SourceConfig("tfds:tiny_safetyy"))
    assert "tfds build tiny_safetyy --file_format=array_record" in missing and str(tmp_path) in missing
    assert "tensorflow" not in sys.modules


def test_embedded_files_are_resolved(tmp_path, monkeypatch):
    write(tmp_path / "train.jsonl", ROWS)
    monkeypatch.setattr(paths, "resolve", lambda path: tmp_path / path.removeprefix("sandbox:"))
    assert len(load_source(SourceConfig())[0]) == 3


def test_write_jsonl_is_whole_or_absent(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    write_jsonl(path, ROWS)
    assert [r.prompt for r in load_source(SourceConfig(str(path)))[0]] == [r["prompt"] for r in ROWS]

    def failing():
        yield {"prompt": "half"}
        raise KeyboardInterrupt

    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write_jsonl(path, failing())
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["rows.jsonl"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside the repository")
def test_real_sets():
    adv, _ = load_source(SourceConfig(f"{SHARED}/advbench/harmful_behaviors.csv", prompt_field="goal", label="harmful"))
    safe, _ = load_source(SourceConfig(f"{SHARED}/xstest/xstest_prompts.csv", where="label=safe", label="benign", category_field="type"))
    gsm, _ = load_source(
        SourceConfig(f"{SHARED}/gsm8k/test.jsonl", prompt_field="question", response_field="answer", label="benign", limit=50)
    )
    assert (len(adv), len(safe), len(gsm)) == (520, 250, 50)
    assert adv[0].extra["target"].startswith("Sure") and safe[0].category == "homonyms" and "####" in gsm[0].response
