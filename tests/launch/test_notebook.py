"""The notebook: its format, and its cells run on the CPU."""

import ast
import json
import os
from pathlib import Path

import cell_runner
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "launch" / "colab_tpu.ipynb"


def test_the_notebook_is_valid_and_holds_no_outputs():
    book = json.loads(NOTEBOOK.read_text())
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5) and book["metadata"]["kernelspec"]["name"] == "python3"
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])
    for cell in book["cells"]:
        of_code = {"outputs", "execution_count"} if cell["cell_type"] == "code" else set()
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | of_code
        assert cell["cell_type"] in ("markdown", "code") and all(isinstance(line, str) for line in cell["source"])
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            assert set(cell["metadata"]["tags"]) & {"install", "sandbox", "lora"}


def test_every_cell_is_python_once_its_magics_are_translated():
    ast.parse(cell_runner.script(cell_runner.cells(NOTEBOOK, "install", "sandbox", "lora")))


def test_a_failed_command_stops_the_runner(tmp_path):
    book = {"cells": [{"cell_type": "code", "metadata": {"tags": ["sandbox"]}, "source": ["n = 3\n", "!exit {n}\n", "print('after')\n"]}]}
    (tmp_path / "book.ipynb").write_text(json.dumps(book))
    done = cell_runner.run(tmp_path / "book.ipynb", "sandbox")
    assert done.returncode == 1 and "exit code 3: exit 3" in done.stderr and "after" not in done.stdout


@pytest.mark.slow
def test_the_sandbox_and_lora_cells_run_on_the_cpu(tmp_path):
    settings = {"OPSA_NOTEBOOK_OUT": str(tmp_path), "OPSA_NOTEBOOK_STEPS": "2", "OPSA_NOTEBOOK_PROMPTS": "8"}
    settings |= {"OPSA_NOTEBOOK_MODEL": "sandbox:base", "OPSA_NOTEBOOK_TOKENS": "16", "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    done = cell_runner.run(NOTEBOOK, "sandbox", "lora", cwd=ROOT, env=os.environ | settings, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("image of ") == 2 and done.stdout.count("asr_plain") >= 1 and "over_refusal" in done.stdout
    results = json.loads((tmp_path / "sandbox" / "results.json").read_text())
    assert results["base"]["asr_seen"]["n"] == 8 and (tmp_path / "lora" / "plot.png").stat().st_size > 10_000
