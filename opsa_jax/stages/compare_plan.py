"""From the arms, seeds, bases and lengths of `python -m opsa_jax.compare` to the runs they stand for, all checked."""

import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opsa_jax.cli import parse
from opsa_jax.config import RunConfig
from opsa_jax.errors import UserError, did_you_mean
from opsa_jax.recipes import load_recipe, validate

if TYPE_CHECKING:
    from opsa_jax.compare import CompareConfig

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
# The comparison's own, so an arm may not set them.
OWN = {
    "--out": "--out", "--resume": "--resume", "--no-resume": "--resume", "--seed": "--seeds",
    "--export.enabled": "--export", "--export.no-enabled": "--export", "--print-config": "",
}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    name: str
    recipe: str
    """Path of the recipe file."""
    overrides: tuple[str, ...] = ()
    """Flags and values, as on the command line of `train`."""


@dataclass(frozen=True)
class Planned:
    """One run to be."""

    arm: str
    base: str
    """Name of the base model."""
    steps: int
    """--train.steps; 0 is by epochs."""
    seed: int
    config: RunConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.out)

    @property
    def name(self) -> str:
        return run_name(self.arm, self.base, self.steps, self.seed)


def run_name(arm: str, base: str, steps: int, seed: int) -> str:
    """Folder of a run below OUT/runs.

    >>> run_name("opsa", "sandbox-base", 30, 0)
    'opsa/sandbox-base/steps30-seed0'
    """
    return f"{arm}/{base}/steps{steps}-seed{seed}"


def parse_arm(text: str) -> Arm:
    """`[NAME=]RECIPE.py[,--flag,value ...]`; commas inside a value are part of it.

    >>> parse_arm("weak=a/opsa.py,--teacher.context-harmful,no, never,--optim.lr 1e-4")
    Arm(name='weak', recipe='a/opsa.py', overrides=('--teacher.context-harmful', 'no, never', '--optim.lr', '1e-4'))
    """
    head, *pieces = re.split(r",(?=--)", text)
    name, named, recipe = head.partition("=")
    overrides: list[str] = []
    for piece in pieces:
        flag, value = re.fullmatch(r"(--[^=, ]*)(?:[=, ](.*))?", piece, re.DOTALL).groups()
        overrides += [flag] if value is None else [flag, value]
    return Arm(name if named else Path(head).stem, recipe if named else head, tuple(overrides))


def read_arms(path: str) -> tuple[list[Arm], list[str]]:
    """Arms of a JSON file, and its overrides for all of them.

    Raises:
        UserError: no such file, not JSON, or not of the form that --help shows.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"--arms {path}: {e}") from None

    def checked(value: Any, kind: type, where: str, keys: Sequence[str] = ()) -> Any:
        strings = kind is not list or (isinstance(value, list) and all(isinstance(x, str) for x in value))
        if not isinstance(value, kind) or not strings:
            raise UserError(f"--arms {path}: {where} must be {({dict: 'an object', list: 'a list of strings', str: 'a string'})[kind]}")
        if keys and (unknown := [k for k in value if k not in keys]):
            raise UserError(f"--arms {path}: {where} has an unknown key {unknown[0]!r}{did_you_mean(unknown[0], keys)}")
        return value

    checked(content, dict, "the file", ("arms", "overrides"))
    arms = []
    for name, arm in checked(content.get("arms"), dict, "'arms'").items():
        checked(arm, dict, f"arm {name!r}", ("recipe", "overrides"))
        recipe = checked(arm.get("recipe"), str, f"'recipe' of arm {name!r}")
        arms.append(Arm(name, recipe, tuple(checked(arm.get("overrides", []), list, f"'overrides' of arm {name!r}"))))
    return arms, checked(content.get("overrides", []), list, "'overrides'")


def parse_base(text: str) -> tuple[str, str]:
    """`[NAME=]PATH` -> (name, path).

    >>> parse_base("sandbox:base"), parse_base("b=runs/b/hf")
    (('sandbox-base', 'sandbox:base'), ('b', 'runs/b/hf'))
    """
    name, named, path = text.partition("=")
    return (name, path) if named else (re.sub(r"[^A-Za-z0-9._+-]", "-", text.rstrip("/").split("/")[-1]), text)


def plan(config: "CompareConfig", shared: Sequence[str]) -> list[Planned]:
    """All runs: seeds outermost, so that an interrupted comparison has as many seeds of every arm.

    Raises:
        UserError: anything wrong with arms, recipes, flags, bases.
    """
    from_file, file_overrides = read_arms(config.arms) if config.arms else ([], [])
    arms, shared = [*map(parse_arm, config.recipes), *from_file], [*file_overrides, *shared]
    bases = [parse_base(b) for b in config.bases]
    if not arms:
        raise UserError("no arms; give recipe files (configs/sandbox/opsa.py) before the flags, or --arms FILE (--help shows both)")
    _unique("arm", [a.name for a in arms], "NAME=RECIPE.py")
    _unique("base", [name for name, _ in bases], "NAME=PATH")
    for flag, numbers, least in (("--seeds", config.seeds, 0), ("--steps", config.steps, 1)):
        _unique(flag, [str(n) for n in numbers], "each once")
        if wrong := [n for n in numbers if n < least]:
            raise UserError(f"{flag} {wrong[0]}: must be at least {least}")
    if not config.seeds or not config.safety:
        raise UserError(f"--{'seeds' if not config.seeds else 'safety'} needs at least one value")
    if wrong := [x for x in config.levels if not 0 < x <= 1]:
        raise UserError(f"--levels {wrong[0]}: must be above 0 and at most 1")
    own = OWN | ({"--model.path": "--bases"} if bases else {}) | ({"--train.steps": "--steps"} if config.steps else {})
    plans = []
    for seed in config.seeds:
        for base in bases or [None]:
            for steps in config.steps or [None]:
                for arm in arms:
                    try:
                        plans.append(_planned(arm, shared, own, base, steps, seed, config))
                    except UserError as e:
                        raise UserError(f"arm {arm.name}: {e}") from None
    return plans


def _unique(what: str, names: Sequence[str], how: str) -> None:
    if twice := [n for n in names if names.count(n) > 1]:
        raise UserError(f"{what} {twice[0]} is there twice; give {how}")
    if not what.startswith("--") and (wrong := [n for n in names if not NAME.fullmatch(n)]):
        raise UserError(f"{what} name {wrong[0]!r}: letters, digits and . _ + - are allowed, since it names a folder; give {how}")


def _planned(arm: Arm, shared: Sequence[str], own: dict, base: tuple[str, str] | None, steps: int | None, seed: int, c: "CompareConfig"):
    for flag in (*shared, *arm.overrides):
        if (name := flag.partition("=")[0].replace("_", "-")) in own:
            raise UserError(f"{name} cannot be set for an arm" + (f"; compare has {own[name]} for it" if own[name] else ""))
    known = {"{seed}": str(seed), "{out}": c.out} | ({"{base}": base[1], "{base_name}": base[0]} if base else {})
    fill = functools.partial(re.sub, r"\{(seed|out|base|base_name)\}", lambda m: known.get(m[0], m[0]))
    flags, own_flags = (tuple(map(fill, x)) for x in (shared, arm.overrides))
    if left := [x for x in (*flags, *own_flags) if not base and re.search(r"\{base(_name)?\}", x)]:
        raise UserError(f"{left[0]!r} needs --bases")
    run = _resolved(arm.recipe, flags, own_flags)
    base_name, path = base or parse_base(run.model.path)
    steps = run.train.steps if steps is None else steps
    run = dataclasses.replace(
        run,
        out=str(Path(c.out) / "runs" / run_name(arm.name, base_name, steps, seed)),
        resume=True,
        seed=seed,
        model=dataclasses.replace(run.model, path=path),
        train=dataclasses.replace(run.train, steps=steps),
        export=dataclasses.replace(run.export, enabled=c.export),
    )
    validate(run)
    return Planned(arm.name, base_name, steps, seed, run)


@functools.lru_cache(maxsize=4096)
def _resolved(recipe: str, shared: tuple[str, ...], own: tuple[str, ...]) -> RunConfig:
    """Recipe, then the flags of all arms, then the arm's own: the last word."""
    run = load_recipe(recipe)
    for flags in (shared, own):
        if flags:
            run = parse(RunConfig, run, list(flags), "python -m opsa_jax.compare")
    return run
