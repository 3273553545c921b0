"""Imports go one way: the picture of the rooms is held against the code."""

import ast
from pathlib import Path

import opsa_jax

ROOT = Path(opsa_jax.__file__).parent
# A room may import itself and rooms of a lower floor; rooms of one floor may import each other.
FLOORS = {
    "errors": 0, "paths": 0, "cli": 1, "config": 1, "recipes": 2, "parallel": 2, "models": 3, "data": 4, "rollout": 4, "teachers": 5,
    "objectives": 6, "training": 7, "evals": 7, "analysis": 8, "stages": 9,
}  # fmt: skip
ENTRY = 9  # entry points, and `stages` with what they do


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{a.name}" if node.module == "opsa_jax" else node.module for a in node.names]
    return [m for m in found if m.startswith("opsa_jax.")]


def test_no_import_goes_back():
    wrong = []
    for file in ROOT.rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        here = parts[0]
        for target in map(room, imports(ast.parse(file.read_text()))):
            if target == "__version__":
                continue
            if target == "sandbox" and here != "sandbox":
                wrong.append(f"{file.name} imports the sandbox")
            elif here != "sandbox" and FLOORS.get(target, ENTRY) > FLOORS.get(here, ENTRY):
                wrong.append(f"{'/'.join(parts)} imports {target}")
    assert not wrong


def test_files_stay_readable():
    long = {str(f.relative_to(ROOT)): n for f in ROOT.rglob("*.py") if (n := len(f.read_text().splitlines())) > 420}
    assert not long
