"""Benchmarks as records: `--suite safety,gsm8k,sandbox,my.jsonl` -> prompts that say how they are scored.

A record of a benchmark is a `data.records.Record` whose `extra` has

| field | |
|---|---|
| metric | name of the rate: asr_*, over_refusal*, or the name of a task |
| benchmark, subtype | where it comes from |
| scorer | request, gsm8k, math, choice, code; sandbox for suites of evals/suite.py |
| room | tokens for the response |
| expect | request: content only a compliant answer has; tasks: the expected answer |
| options | choice: how many options |
| question | tasks: the question without the instructions around it |
| tests, entry_point, code_prompt | code |
| behavior, context | what a judge is told: the request without its context, and the context |
| attack | name of the transform that made the prompt, where one did |
| prefill | text the answer is forced to start with |
"""

import dataclasses
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from opsa_jax.data.hub import split_files
from opsa_jax.data.records import BadRecord, Record, plain
from opsa_jax.data.tables import Table, Tfds, open_table
from opsa_jax.errors import UserError, did_you_mean
from opsa_jax.evals.benchmark_table import BENCHMARKS, GROUPS, OPTIONAL, Benchmark
from opsa_jax.evals.suite import SUITES, load_suite

Transform = Callable[[Record], Sequence[Record]]
"""One harmful record into its attacked versions: prompt, system or `extra["prefill"]` changed (attacks/build.py has them)."""


def attacked(records: Sequence[Record], attacks: Mapping[str, Transform]) -> list[Record]:
    """Every harmful request under every attack; versions of one request keep its id as `extra["origin"]`, for any-of-N."""
    found = []
    for name, transform in attacks.items():
        for record in records:
            if record.label != "harmful" or record.extra.get("scorer") not in ("request", "sandbox"):
                continue
            for i, version in enumerate(transform(record)):
                extra = dict(version.extra) | {"metric": f"{record.extra['metric']}_{name}", "attack": name, "origin": record.id}
                extra.setdefault("behavior", record.prompt)
                found.append(dataclasses.replace(version, id=f"{record.id}/{name}/{i}", extra=extra))
    return found


def load(
    spec: str,
    data_dir: str = "",
    limit: int = 0,
    missing: str = "error",
    choice: str = "auto",
    told: Callable[[str], None] = print,
    attacks: Mapping[str, Transform] | None = None,
) -> list[Record]:
    """Records of a suite: groups, benchmarks (NAME, NAME:SUBSET, NAME=FILE, NAME=hf:..., NAME=tfds:...), `sandbox`, suite files.

    Args:
        spec: separated by commas.
        data_dir: a folder with the sets' files; empty takes the hub.
        limit: the first this many of each metric; 0 is all.
        missing: `error`, or `skip` to leave out sets that cannot be had, and say so through `told`.
        attacks: what group `attacks` applies to all harmful requests of the other sets (of group safety where there is none):
            see `attacked`.
        choice: multiple choice by `likelihood` of the letters or by `generate`d answers; auto is the benchmark's own.

    Raises:
        UserError: an unknown name, a set that is not there (how to get it), wrong columns, an empty suite.
    """
    names = [n.strip() for n in spec.split(",") if n.strip()]
    wanted = wants_attacks(spec)
    names = [n for n in names if n != "attacks"]
    names = _expanded(names or (["safety"] if wanted else []))
    if not names:
        raise UserError(f"--suite {spec!r} names nothing; allowed: {', '.join(GROUPS)}, sandbox, a benchmark (--list), or a JSONL file")
    records: list[Record] = []
    for name in names:
        try:
            records += _limited(_load_one(name, data_dir, choice), limit)
        except UserError as e:
            if missing == "error" or not isinstance(e, Missing):
                raise
            told(f"left out: {e}")
    if not records:
        raise UserError(f"suite {spec}: none of its sets can be had; give --data-dir a folder with them (--list names their files)")
    records += attacked(records, attacks or {}) if wanted else []
    if twice := _repeated(r.id for r in records):
        raise UserError(f"suite {spec}: {twice!r} occurs twice; name each set once")
    return records


def wants_attacks(spec: str) -> bool:
    """Whether a suite names the group `attacks`."""
    return "attacks" in [n.strip() for n in spec.split(",")]


class Missing(UserError):
    """A set that cannot be had; `missing=skip` leaves it out."""


def is_plain(spec: str) -> bool:
    """One suite of evals/suite.py (`sandbox`, or a file in its format) and nothing else."""
    return spec in SUITES or ("," not in spec and "=" not in spec and spec.endswith((".jsonl", ".jsonl.gz")))


def _expanded(names: Sequence[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        group = [b.name for b in BENCHMARKS.values() if name in GROUPS and b.group == name]
        found += [n for n in (group or [name]) if n not in found]
    return found


def _repeated(ids) -> str | None:
    seen: set[str] = set()
    return next((i for i in ids if i in seen or seen.add(i)), None)


def _limited(records: Sequence[Record], limit: int) -> list[Record]:
    counts: dict[str, int] = {}
    kept = []
    for r in records:
        counts[r.extra["metric"]] = counts.get(r.extra["metric"], 0) + 1
        if not limit or counts[r.extra["metric"]] <= limit:
            kept.append(r)
    return kept


def _load_one(name: str, data_dir: str, choice: str) -> list[Record]:
    if name in SUITES or (name.endswith((".jsonl", ".jsonl.gz")) and "=" not in name):
        extra = {"benchmark": name, "scorer": "sandbox"}
        prefix = "" if name in SUITES else f"{Path(name).stem}/"
        records = [dataclasses.replace(r, id=prefix + r.id, extra=dict(r.extra) | extra) for r in load_suite(name)]
        if twice := _repeated(r.id for r in records):
            raise UserError(f"{name}: id {twice!r} occurs twice; make ids unique")
        return records
    name, _, path = name.partition("=")
    name, _, subset = name.partition(":")
    if name not in BENCHMARKS:
        allowed = [*BENCHMARKS, *SUITES, *GROUPS]
        raise UserError(f"no benchmark {name!r}{did_you_mean(name, allowed)} (--list shows all; a suite file ends in .jsonl)")
    benchmark = BENCHMARKS[name]
    records = read(benchmark, path or data_dir, choice=choice, one_file=bool(path))
    if subset:
        wanted = benchmark.subsets.get(subset, (subset,))
        known = sorted({r.extra["subtype"] for r in records} | set(benchmark.subsets))
        records = [r for r in records if r.extra["subtype"] in wanted]
        if not records:
            raise UserError(f"{name} has no subset {subset!r}{did_you_mean(subset, known)}")
    return records


def read(benchmark: Benchmark, where: str = "", choice: str = "auto", one_file: bool = False) -> list[Record]:
    """All records of a benchmark.

    Args:
        where: a folder that holds its files, or with `one_file` a file, hf:NAME or tfds:NAME; empty takes the hub.

    Raises:
        UserError: not there, or without the columns that are needed.
    """
    records: list[Record] = []
    seen: set[str] = set()
    kinds: set[str] = set()
    for table, subtype in _tables(benchmark, where, one_file):
        for i in range(len(table)):
            place = f"{benchmark.name}: {table.name}, {table.unit} {table.line(i)}"
            try:
                row = table.row(i)
                if i == 0:
                    _check_columns(benchmark, table.name, row)
                values = {role: _first(row, names) for role, names in benchmark.columns.items()}
                values["subtype"] = subtype or values.get("subtype")
                if any(plain(values[role]) not in allowed for role, allowed in benchmark.where.items()):
                    kinds.update(str(plain(values[role])) for role in benchmark.where)
                    continue
                record = _record(benchmark, values, len(records), choice)
            except BadRecord as e:
                raise UserError(f"{place}: {e}") from None
            if benchmark.name == "saferlhf" and record.prompt in seen:
                continue
            seen.add(record.prompt)
            records.append(dataclasses.replace(record, source=table.name, line=table.line(i)))
    if not records:
        found = f" (it has {', '.join(sorted(kinds)[:6])})" if kinds else ""
        raise UserError(f"{benchmark.name}: no row has {benchmark.where or 'a prompt'}{found}; is this the right file?")
    ids = [r.id for r in records]
    if len(set(ids)) < len(ids):  # ids of the set's own that repeat: numbers are safe
        records = [dataclasses.replace(r, id=f"{benchmark.name}/{n}") for n, r in enumerate(records)]
    return records


def _tables(benchmark: Benchmark, where: str, one_file: bool) -> Iterator[tuple[Table, str]]:
    """Tables, each with the subtype of all its rows where that is not a column."""
    if one_file:
        scheme, _, name = where.partition(":")
        if scheme == "hf":
            yield from _hub(benchmark, name)
        elif scheme == "tfds":
            yield Tfds(name, benchmark.split), ""
        else:
            yield open_table(Path(where).expanduser()), ""
        return
    if where:
        folder = Path(where).expanduser()
        if not folder.is_dir():
            raise UserError(f"--data-dir {where!r} is no folder")
        for names in benchmark.files:
            if all((folder / n).is_file() for n in names):
                yield from ((open_table(folder / n), "") for n in names)
                return
        wanted = " or ".join(" with ".join(names) for names in benchmark.files[:2])
        raise Missing(f"{benchmark.name} is not in {where}: it needs {wanted}; {how_to_get(benchmark)}")
    yield from _hub(benchmark, benchmark.hub)


def _hub(benchmark: Benchmark, name: str) -> Iterator[tuple[Table, str]]:
    name, _, config = name.partition(":")
    several = config.split("+") if "+" in config else []
    try:
        for part in several or [config]:
            found = split_files(f"{name}:{part}" if part else name, benchmark.split)
            yield from ((open_table(path), part if several else "") for path in found)
    except UserError as e:
        raise Missing(f"{benchmark.name}: {e}; or {how_to_get(benchmark)}") from None


def how_to_get(benchmark: Benchmark) -> str:
    """One phrase: where the set is, and how to name a file of it."""
    terms = ", after accepting its terms there and logging in" if benchmark.gated else ""
    return f"get it from {benchmark.url} (hub: {benchmark.hub}{terms}), then --data-dir FOLDER or {benchmark.name}=FILE"


def _check_columns(benchmark: Benchmark, file: str, row: Mapping[str, Any]) -> None:
    for role, names in benchmark.columns.items():
        if role not in OPTIONAL and not any(n in row for n in names):
            wanted = " or ".join(repr(n) for n in names)
            raise UserError(f"{benchmark.name}: {file} has no column {wanted}; it has {', '.join(map(str, row))}; is this the right file?")


def _first(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((row[n] for n in names if n in row), None)


def _record(benchmark: Benchmark, values: Mapping[str, Any], number: int, choice: str) -> Record:
    prompt = values["prompt"]
    prompt = prompt[0] if isinstance(prompt, list) and prompt else prompt
    if not isinstance(prompt, str) or not prompt.strip():
        raise BadRecord("the prompt is empty or no text")
    own = plain(values.get("id")) or ""
    extra: dict[str, Any] = {
        "metric": benchmark.metric,
        "benchmark": benchmark.name,
        "subtype": plain(values.get("subtype")) or "",
        "scorer": benchmark.scorer,
        "room": benchmark.room,
    }
    make = {"request": _request, "gsm8k": _task, "math": _task, "choice": _choice, "code": _code}[benchmark.scorer]
    text, more = make(benchmark, values, prompt, choice)
    return Record(
        id=f"{benchmark.name}/{own or number}",
        prompt=text,
        label=benchmark.label,
        category=plain(values.get("category")) or "",
        extra=extra | more,
    )


def _request(benchmark: Benchmark, values: Mapping[str, Any], prompt: str, choice: str) -> tuple[str, dict[str, Any]]:
    # HarmBench puts a contextual behaviour's context before the request, in its own format for open models.
    context = (values.get("context") or "").strip()
    text = f"{context}\n\n---\n\n{prompt}" if context else prompt
    return text, {"behavior": prompt, "context": context}


def _task(benchmark: Benchmark, values: Mapping[str, Any], prompt: str, choice: str) -> tuple[str, dict[str, Any]]:
    answer = plain(values["answer"])
    if not answer:
        raise BadRecord("the answer is empty or no text")
    return benchmark.prompt.replace("{prompt}", prompt), {"expect": answer, "question": prompt}


def _choice(benchmark: Benchmark, values: Mapping[str, Any], prompt: str, choice: str) -> tuple[str, dict[str, Any]]:
    if "options" in values:
        options, right = values["options"], values["answer"]
        right = "ABCDEFGHIJ".index(right) if isinstance(right, str) and len(right) == 1 and right in "ABCDEFGHIJ" else right
        if not isinstance(options, list) or not isinstance(right, int) or not 0 <= right < len(options):
            raise BadRecord(f"choices must be a list and answer the number or letter of one, not {str(right)[:20]!r}")
    else:
        options = [str(values[r]).strip() for r in ("right", "wrong1", "wrong2", "wrong3")]
        order = list(range(4))
        random.Random(hashlib.sha256(prompt.encode()).digest()).shuffle(order)
        options, right = [options[i] for i in order], order.index(0)
    letters = "ABCDEFGHIJ"[: len(options)]
    listed = "\n".join(f"({letter}) {text}" for letter, text in zip(letters, options, strict=True))
    by_likelihood = choice == "likelihood" or (choice == "auto" and benchmark.name == "mmlu")
    text = benchmark.prompt.replace("{options}", listed).replace("{prompt}", prompt)
    more = {"expect": letters[right], "options": len(options), "question": prompt}
    return text, more | ({"scorer": "likelihood"} if by_likelihood else {})


def _code(benchmark: Benchmark, values: Mapping[str, Any], prompt: str, choice: str) -> tuple[str, dict[str, Any]]:
    tests, entry = values["tests"], values.get("entry_point") or ""
    if isinstance(tests, list):
        shown = "\n".join(tests)
        source = "\n".join([*(values.get("imports") or []), shown])
        text = benchmark.prompt.replace("{tests}", shown).replace("{prompt}", prompt)
        return text, {"tests": source, "entry_point": "", "code_prompt": "", "question": prompt}
    more = {"tests": f"{tests}\n\ncheck({entry})\n", "entry_point": entry, "code_prompt": prompt, "question": prompt}
    return benchmark.prompt.replace("{prompt}", prompt), more
