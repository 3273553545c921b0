"""The convert entry point: what it prints, writes and refuses."""

import json
import shutil

import jax
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_hf import batch, torch_model
from transformers import AutoModelForCausalLM

from opsa_jax import convert
from opsa_jax.cli import entry


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch_model("qwen3-tied").save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(convert, "make_mesh", lambda cfg, make=convert.make_mesh: make(cfg, jax.devices()[:1]))


def run(capsys, *argv) -> tuple[int, str, str]:
    code = entry(convert.main, [str(a) for a in argv])
    return code, *capsys.readouterr()


def test_import_says_what_it_is_and_writes_a_clean_copy(base, tmp_path, capsys):
    source = shutil.copytree(base, tmp_path / "source")
    (source / "modeling_evil.py").write_text("raise SystemExit")
    (source / "tokenizer.json").write_text("{}")
    code, out, _ = run(capsys, "import", source)
    total = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(base).parameters())
    assert code == 0 and out.startswith("qwen3: 3 layers, d_model 32, 4 heads of 16 (2 key-value), vocabulary 64, ")
    assert f" {total:,} parameters, float32\n" in out and sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    code, out, _ = run(capsys, "import", source, "--out", tmp_path / "out", "--dtype", "bfloat16", "--shard-gb", "1e-5")
    assert code == 0 and f"wrote {tmp_path / 'out'} (bfloat16)" in out
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} < files and "modeling_evil.py" not in files
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_export_merges_an_adapter(base, tmp_path, capsys):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    theirs.save_pretrained(tmp_path / "adapter")
    code, out, _ = run(capsys, "export", base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    assert code == 0 and "(rank 2, alpha 4, q down)" in out
    tokens = torch.from_numpy(batch()[0])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        np.testing.assert_allclose(merged(tokens).logits, theirs.eval()(tokens).logits, atol=1e-4)


def test_verify(base, capsys):
    code, out, _ = run(capsys, "verify", base, "--tokens", "12")
    lines = out.splitlines()
    tensors = len(load_file(base / "model.safetensors"))
    assert code == 0 and lines[1:3] == [f"round trip: {tensors} tensors equal bit for bit", "round trip: logits equal bit for bit"]
    assert float(lines[3].partition("difference of logits ")[2].split()[0]) < 1e-4


def test_verify_fails_when_a_tensor_does_not_survive(base, tmp_path, capsys):
    """A norm in another dtype than the rest."""
    folder = shutil.copytree(base, tmp_path / "mixed")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].astype(np.float16)}, folder / "model.safetensors")
    code, _, err = run(capsys, "verify", folder)
    assert code == 2 and "tensor model.norm.weight is float16 and does not survive a round trip (written as float32)" in err


def test_verify_fails_when_transformers_computes_something_else(base, capsys, monkeypatch):
    monkeypatch.setattr(convert, "transformers_logits", lambda folder, tokens, mask: np.ones((*tokens.shape, 64), np.float32))
    code, _, err = run(capsys, "verify", base, "--tokens", "12")
    assert code == 2 and "logits differ from transformers by more than 0.001 of the largest" in err


def test_mistakes_are_one_line_and_exit_code_2(base, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    broken = shutil.copytree(base, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"softcap": 3}))
    mistakes = {
        ("import", tmp_path / "nothing"): "no folder",
        ("import", base, "--out", tmp_path / "taken"): "taken exists; choose another folder",
        ("import", broken): "unknown field 'softcap'=3",
        ("export", base, "--out", tmp_path / "out", "--adapter", base): "has no adapter_config.json",
        ("export", base): "--out",
        ("import", base, "--dtype", "int8"): "int8",
        ("convert", base): "convert",
    }
    for argv, message in mistakes.items():
        code, _, err = run(capsys, *argv)
        assert code == 2 and err.startswith("opsa convert: error: ") and message in err and err.count("\n") == 1, (argv, err)
    _, out, _ = run(capsys, "import", base, "--out", tmp_path / "taken")
    assert out == ""  # said before the checkpoint is loaded


def test_help_teaches(capsys):
    for argv in (["--help"], ["import", "--help"], ["export", "--help"], ["verify", "--help"]):
        with pytest.raises(SystemExit) as done:
            convert.main(argv)
        text = capsys.readouterr().out
        assert done.value.code == 0 and "checkpoint" in text
