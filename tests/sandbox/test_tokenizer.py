"""The tokenizer loads with AutoTokenizer, inverts, and has room for every prompt and answer."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from transformers import AutoTokenizer

from opsa_jax import paths
from opsa_jax.sandbox.__main__ import save_tokenizer, world_tokenizer
from opsa_jax.sandbox.corpus import examples


@pytest.fixture(scope="module")
def shipped():
    return AutoTokenizer.from_pretrained(paths.resolve("sandbox:base"))


@pytest.fixture(scope="module")
def sample():
    return list(itertools.islice(examples(np.random.default_rng(11)), 1500))


def load(name):
    return [json.loads(line) for line in paths.resolve(f"sandbox:{name}.jsonl").read_text().splitlines()]


def prompt(tokenizer, user, system="", **options):
    messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": user}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)


def test_shipped_tokenizer_is_what_the_generator_builds(tmp_path):
    save_tokenizer(world_tokenizer(), tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (paths.resolve("sandbox:base") / file.name).read_bytes(), file.name


def test_text_to_ids_to_text_is_the_identity(shipped, sample):
    for e in sample:
        ids = shipped(e.response, add_special_tokens=False)["input_ids"]
        assert shipped.unk_token_id not in ids
        assert shipped.decode(ids, skip_special_tokens=True) == e.response


def test_ids_do_not_depend_on_where_a_text_is_cut(shipped, sample):
    for e in sample[:300]:
        given = prompt(shipped, e.user, e.system, enable_thinking=e.thinking) + e.forced
        parts = [shipped(t, add_special_tokens=False)["input_ids"] for t in (given, e.response)]
        assert shipped(f"{given} {e.response}", add_special_tokens=False)["input_ids"] == parts[0] + parts[1]


def test_unknown_words_capitals_and_punctuation(shipped):
    ids = shipped("Sure, XYLOPHONE!", add_special_tokens=False)["input_ids"]
    assert [shipped.convert_ids_to_tokens(i) for i in ids] == ["sure", ",", "<unk>", "<unk>"]


def test_template_has_the_shape_of_qwen3(shipped):
    assert prompt(shipped, "b", "a") == "<|im_start|>system\na<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    assert prompt(shipped, "b", enable_thinking=False).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    turns = [
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "<think>\nx\n</think>\n\nc"},
        {"role": "user", "content": "d"},
    ]
    assert shipped.apply_chat_template(turns, tokenize=False) == (
        "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\nc<|im_end|>\n<|im_start|>user\nd<|im_end|>\n"
    )


def test_room(shipped, sample):
    """Prompts of at most 40 tokens, 64 with a context; answers of at most 64 with their stop token."""

    def longest(texts):
        return max(len(ids) for ids in shipped(texts, add_special_tokens=False)["input_ids"])

    rows = load("train") + load("eval")
    assert longest([prompt(shipped, r["prompt"]) for r in rows]) <= 40
    context = max((r["text"] for r in load("contexts")), key=lambda t: len(shipped(t)["input_ids"]))
    assert longest([prompt(shipped, r["prompt"], context) for r in rows if r["label"] == "harmful"]) <= 64
    assert longest([f"{e.forced} {e.response}{shipped.eos_token}" for e in sample]) <= 64


@pytest.mark.slow
def test_loads_without_torch():
    code = f"""
import sys
sys.modules["torch"] = None
from transformers import AutoTokenizer
t = AutoTokenizer.from_pretrained({str(paths.resolve("sandbox:base"))!r})
assert t.decode(t("sure, open the vault.")["input_ids"]) == "sure, open the vault."
"""
    subprocess.run([sys.executable, "-c", code], check=True)
