"""The generate entry point: rows, resuming, settings, mistakes."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_models import padded, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opsa_jax import generate
from opsa_jax.cli import entry
from opsa_jax.data.chat import Chat
from opsa_jax.models import hf
from opsa_jax.parallel import mesh
from opsa_jax.rollout.engine import Engine
from opsa_jax.rollout.filters import Sampling
from opsa_jax.rollout.sampler import sample

WORDS = [f"w{i}" for i in range(58)]
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
PROMPTS = ["w1 w2", "w3", "w4 w5 w6 w7", "w8 w9"]


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(mesh, "make_mesh", lambda cfg, make=mesh.make_mesh: make(cfg, jax.devices()[:1]))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate") / "model"
    params, cfg = tiny("llama")
    hf.save_params(params, cfg, folder, "float32")
    vocab = {w: i for i, w in enumerate(["<pad>", "<|im_start|>", "<|im_end|>", "user", "assistant", "system", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    """Without labels, and with ids of two kinds."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"id": f"p{i}" if i else 0, "prompt": p}) + "\n" for i, p in enumerate(PROMPTS)))
    return file


def run(capsys, *argv) -> tuple[int, str, str]:
    code = entry(generate.main, ["--max-new-tokens", "12", *map(str, argv)])
    return code, *capsys.readouterr()


def read(file) -> dict[tuple[str, int], dict]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({(r["id"], r["sample"]) for r in rows}) == len(rows)
    return {(r["id"], r["sample"]): r for r in rows}


def test_rows_are_what_the_sampler_gives(model, prompts, tmp_path, capsys):
    out = tmp_path / "new" / "out.jsonl"
    code, said, err = run(capsys, "--model", model, "--prompts", prompts, "--out", out, "--temperature", 0, "--context", "w50 w51")
    assert code == 0 and f"{out}: 4 responses" in said and not err
    rows = read(out)
    chat = Chat.load(str(model))
    encoded = padded([chat.encode(p, "w50 w51") for p in PROMPTS], 24)
    rollout = sample(*tiny("llama"), Sampling(0.0), chat.stop_ids, 12, *encoded, jax.random.split(jax.random.key(0), 4))
    for i, prompt in enumerate(PROMPTS):
        n = int(rollout.response_mask_BR[i].sum())
        text = chat.decode_response(np.asarray(rollout.response_ids_BR)[i, :n].tolist())
        name, finished = f"p{i}" if i else "0", bool(rollout.finished_B[i])
        assert rows[name, 0] == {"id": name, "sample": 0, "prompt": prompt, "response": text, "finished": finished, "tokens": n}
    assert len({r["response"] for r in rows.values()}) == 4


@pytest.fixture
def sampled(model, prompts):
    return "--model", model, "--prompts", prompts, "--temperature", 1.2, "--samples-per-prompt", 3, "--batch", 4


def test_resume_neither_repeats_nor_loses_a_row(sampled, tmp_path, capsys, monkeypatch):
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    assert run(capsys, *sampled, "--out", whole)[0] == 0
    assert len(read(whole)) == 12

    def stopped(self, prompts, keys_N, stream=Engine.stream):
        for n, found in enumerate(stream(self, prompts, keys_N)):
            if n == 5:
                raise KeyboardInterrupt
            yield found

    with monkeypatch.context() as m:
        m.setattr(Engine, "stream", stopped)
        assert run(capsys, *sampled, "--out", broken)[0] == 130
    assert len(read(broken)) == 5
    with broken.open("a") as f:
        f.write('{"id": "p1", "sam')  # the machine went down in the middle of a line
    before = broken.read_text()[: -len('{"id": "p1", "sam')]
    code, said, _ = run(capsys, *sampled, "--out", broken, "--resume", "--batch", 2)
    assert code == 0 and "7 responses (5 were there)" in said
    assert read(broken) == read(whole) and broken.read_text().startswith(before)
    after = broken.read_text()
    assert run(capsys, *sampled, "--out", broken, "--resume")[0] == 0 and broken.read_text() == after


def test_samples_differ_and_depend_on_the_seed(sampled, tmp_path, capsys):
    rows = []
    for seed in (0, 1):
        run(capsys, *sampled, "--out", tmp_path / f"{seed}.jsonl", "--seed", seed)
        rows.append([r["response"] for _, r in sorted(read(tmp_path / f"{seed}.jsonl").items())])
    assert len(set(rows[0])) > 9 and sum(a == b for a, b in zip(*rows, strict=True)) < 3


def test_steering_file(model, prompts, tmp_path, capsys):
    steer_LD = np.random.default_rng(0).standard_normal((2, 32), np.float32)
    save_file({"direction": steer_LD}, tmp_path / "v.safetensors")
    found = []
    for name, flags in {
        "plain": [],
        "zero": ["--steering", tmp_path / "v.safetensors", "--steering-coefficient", 0],
        "two": ["--steering", tmp_path / "v.safetensors", "--steering-coefficient", 2],
    }.items():
        code, *_ = run(capsys, "--model", model, "--prompts", prompts, "--out", tmp_path / name, "--temperature", 0, *flags)
        assert code == 0
        found.append(read(tmp_path / name))
    assert found[0] == found[1] != found[2]
    save_file({"a": steer_LD, "b": steer_LD}, tmp_path / "two.safetensors")
    code, _, err = run(capsys, "--model", model, "--prompts", prompts, "--out", tmp_path / "x", "--steering", tmp_path / "two.safetensors")
    assert code == 2 and "one tensor of shape (2, 32)" in err and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "temperature=-1.0: must be 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
        (["--batch", "0"], "--batch 0"),
        (["--context", "@nobody"], "no context named"),
        (["--prompt-field", "promt"], "did you mean 'prompt'"),
        (["--id-field", "prompt_kind"], None),
        (["--model", "nowhere"], "no folder 'nowhere'"),
        (["--top-q", "1"], "--top-q"),
    ],
)
def test_mistakes_are_one_line(model, prompts, tmp_path, capsys, flags, message):
    if message is None:
        prompts.write_text("".join(json.dumps({"prompt_kind": "a", "prompt": p}) + "\n" for p in PROMPTS))
        message = "id 'a' occurs twice"
    code, out, err = run(capsys, "--model", model, "--prompts", prompts, "--out", tmp_path / "o.jsonl", *flags)
    assert code == 2 and message in err and err.count("\n") == 1 and not out
    assert not list(tmp_path.glob("o.jsonl*"))


def test_an_existing_file_is_not_overwritten_and_not_mixed(model, prompts, tmp_path, capsys):
    out = tmp_path / "o.jsonl"
    same = "--model", model, "--prompts", prompts, "--out", out, "--temperature", 0
    assert run(capsys, *same)[0] == 0
    before = out.read_text()
    for flags, message in (
        ([], "continue it with --resume"),
        (["--resume", "--temperature", 1], "--temperature 0.0, not 1.0"),
        (["--resume", "--context", "w1"], "--context '', not 'w1'"),
    ):
        code, _, err = run(capsys, *same, *flags)
        assert code == 2 and message in err and out.read_text() == before
    out.write_text(before.replace('"sample": 0', '"sampel": 0', 1))
    code, _, err = run(capsys, *same, "--resume")
    assert code == 2 and "line 1 is not a row" in err
    (tmp_path / "o.jsonl.settings.json").unlink()
    code, _, err = run(capsys, *same, "--resume")
    assert code == 2 and "o.jsonl.settings.json" in err
