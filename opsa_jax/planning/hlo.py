"""Collectives of a compiled program, read from its text, with how often each one runs.

`cost_analysis` counts the body of a loop once. Here the text is walked from its entry: a `while` multiplies by its trip count, which is
`known_trip_count` where the compiler wrote it down, or the constant that the counter is compared with in the loop's condition. Where
that comparison is one of several conditions (decoding ends early when all rows have stopped) it is an upper bound; loops of one name
that follow each other go on counting where the one before stopped. Where there is no constant (the loop over chunks of the loss runs as
many as there are tokens), the caller says what to assume.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8, "f8e4m3fn": 1, "f8e5m2": 1}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OP = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_CALLED_MANY = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")


@dataclass(frozen=True)
class Collective:
    """One collective operation of a program."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    """Of the largest array it gives, on one device."""
    bytes: int
    """What one device gives or takes in one execution: the gathered, reduced or moved array, whichever side is larger."""
    group: int
    """Devices that take part together."""
    runs: int
    """Executions per call of the program, an upper bound where a loop may end early."""
    source: str
    """Where it comes from in our code (`op_name` of the compiled text)."""
    loops: tuple[str, ...] = ()
    """Source of each loop around it, outermost first."""

    @property
    def wire_bytes(self) -> float:
        """Bytes that leave a device per execution in a ring."""
        share = (self.group - 1) / max(self.group, 1)
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return self.bytes * factor


@dataclass(frozen=True)
class _Op:
    name: str
    result: str
    code: str
    rest: str

    @property
    def source(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


def collectives(text: str, unknown_trips: int = 1) -> list[Collective]:
    """Every collective of a compiled program (`compiled.as_text()`).

    Args:
        unknown_trips: executions of the body of a loop whose trip count is data without a bound.
    """
    entry, computations = _parse(text)
    trips = _trip_counts(computations, unknown_trips)
    found: dict[tuple, Collective] = {}

    def walk(name: str, runs: int, loops: tuple[_Op, ...]) -> None:
        for op in computations.get(name, ()):
            kind = op.code.removesuffix("-start")
            if kind in KINDS:
                # TPU spreads one collective over several fusions, a chain in which all have its channel.
                channel = re.search(r"channel_id=(\d+).*(?:chain_id|async_collective_name)", op.rest)
                key = kind, channel[1] if channel else op.name, tuple(loop.name for loop in loops)
                found.setdefault(key, _collective(op, kind, runs, tuple(loop.source for loop in loops)))
            if op.code == "while":
                body, condition = (re.search(rf"{part}=%?([\w.\-]+)", op.rest)[1] for part in ("body", "condition"))
                for part in (body, condition):
                    walk(part, runs * trips[op.name], (*loops, op))
                continue
            if op.code.endswith(("-done", "-update")):
                continue
            for called in _called(op):
                walk(called, runs, loops)

    walk(entry, 1, ())
    return list(found.values())


def _parse(text: str) -> tuple[str, dict[str, list[_Op]]]:
    computations: dict[str, list[_Op]] = {}
    entry = name = ""
    for line in text.splitlines():
        if line and not line[0].isspace() and (head := _HEAD.match(line)):
            name = head[2]
            computations[name] = []
            entry = name if head[1] else entry
        elif name and (op := _OP.match(line)):
            computations[name].append(_Op(op[2], op[3], op[4], op[5]))
    return entry, computations


def _called(op: _Op) -> list[str]:
    many = [name.strip().lstrip("%") for group in _CALLED_MANY.findall(op.rest) for name in group.split(",")]
    return _CALLED.findall(op.rest) + [name for name in many if name]


def _trip_counts(computations: dict[str, list[_Op]], unknown: int) -> dict[str, int]:
    """Trips of every `while`, by its name."""
    trips: dict[str, int] = {}
    early: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for op in (op for ops in computations.values() for op in ops if op.code == "while"):
        if known := re.search(r'known_trip_count[^}]*?"n":"(\d+)"', op.rest):
            trips[op.name] = int(known[1])
            continue
        ops = computations.get(re.search(r"condition=%?([\w.\-]+)", op.rest)[1], [])
        bound = _bound(ops, computations)
        trips[op.name] = unknown if bound is None else bound
        if bound is not None and not any(o.code == "compare" and o is ops[-1] for o in ops):
            early[op.source].append((bound, op.name))
    for loops in early.values():
        before = 0
        for bound, name in sorted(loops):
            trips[name], before = bound - before, bound
    return trips


def _bound(ops: list[_Op], computations: dict[str, list[_Op]]) -> int | None:
    """The constant that a condition compares its counter with."""
    ops = ops + [inner for op in ops if op.code == "fusion" for name in _called(op) for inner in computations.get(name, ())]
    constants = {}
    for op in ops:
        if op.code == "constant" and op.result.startswith(("s32[]", "u32[]", "s64[]", "u64[]")) and (n := re.match(r"(\d+)\)", op.rest)):
            constants[op.name] = int(n[1])
    for op in ops:
        if op.code == "compare" and "direction=LT" in op.rest:
            operand = re.search(r",\s*(?:[^%,()]*\s)?%?([\w.\-]+)\)", op.rest)
            if operand and operand[1] in constants:
                return constants[operand[1]]
            if len(constants) == 1:  # handed to a fusion as its argument
                return next(iter(constants.values()))
    return None


def _collective(op: _Op, kind: str, runs: int, loops: tuple[str, ...]) -> Collective:
    arrays = [(d, tuple(int(n) for n in dims.split(",") if n)) for d, dims in _ARRAY.findall(op.result) if d in _BYTES]
    sizes = [int(_BYTES[d] * math.prod(shape)) for d, shape in arrays]
    if op.code.endswith("-start") and kind != "all-reduce":
        total = max(sizes)  # (operand, result, ...)
    else:
        total = sum(sizes)
    group = _group(op.rest)
    largest = arrays[sizes.index(max(sizes))]
    return Collective(kind, *largest, total * group if kind == "reduce-scatter" else total, group, runs, op.source, loops)


def _group(rest: str) -> int:
    """Size of a replica group, in any of the spellings of XLA."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(found[1].split(","))
    return 2
