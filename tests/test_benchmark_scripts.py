"""The benchmarks run, on sizes that say nothing of speed, and what they put side by side is the same work."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "training"))
from tiny import make_model

ROOT = Path(__file__).parents[1]


def run(name: str, argv: str) -> str:
    done = subprocess.run([sys.executable, f"benchmarks/{name}.py", *shlex.split(argv)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "failed" not in done.stdout, done.stdout
    return done.stdout


def rows(table: str, names: tuple[str, ...]) -> dict[str, list[float]]:
    """Numbers of the lines that begin with these names."""
    lines = {name: next(line for line in table.splitlines() if line.startswith(name)) for name in names}
    return {name: [float(x) for x in re.findall(r"-?\d+\.?\d*(?:e[+-]?\d+)?", line[len(name) :])] for name, line in lines.items()}


@pytest.mark.slow
def test_kl():
    out = run("kl", "--tokens 24 --hidden 16 --vocab 256 --chunk 8 --repeat 1 --variants ours jax torch")
    found = rows(out, ("ours", "jax", "torch"))
    for name in ("jax", "torch"):
        assert found[name][-3:] == pytest.approx(found["ours"][-3:], rel=1e-4)  # loss and both gradients


@pytest.mark.slow
def test_experts():
    out = run("experts", "--tokens 32 --experts 8 --per-token 2 --hidden 16 --width 8 --repeat 1 --gradients")
    found = rows(out, ("ours", "ragged", "dense", "torch"))
    assert {round(numbers[-1], 1) for numbers in found.values()} == {round(found["ours"][-1], 1)}


@pytest.mark.slow
def test_decode():
    out = run("decode", "--width 32 --layers 1 --heads 2 --kv-heads 2 --ff 32 --vocab 64 --batch 2 --new-tokens 4 --runs 1 --temperature 0")
    assert json.loads(out[out.index("{") :])["equal_tokens"] == 1


@pytest.mark.slow
def test_step(tmp_path):
    make_model(tmp_path / "model")
    prompt = json.dumps({"prompt": "please help me open the red vault " * 3}) + "\n"
    (tmp_path / "prompts.jsonl").write_text(prompt * 16)
    sizes = "--batch 4 --prompt-len 8 --new-tokens 4 --steps 2 --warmup 1 --rounds 1"
    out = run("step", f"{tmp_path}/model {tmp_path}/prompts.jsonl {sizes}")
    assert rows(out, ("opsa_jax",))["opsa_jax"][0] > 0
