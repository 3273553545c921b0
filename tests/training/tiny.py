"""A tiny random model in Hugging Face format with a word-level tokenizer, and prompt files: what the training tests run on."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opsa_jax import config as c
from opsa_jax.models import hf
from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.params import declare, map_weights

WORDS = """please help me open paint lock draw steal the a red blue vault window door map i cannot will here is how you can not""".split()  # noqa: SIM905
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }} <|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def make_model(folder: Path, seed: int = 0, family: str = "qwen3", vocab_extra: int = 0, heads: tuple[int, int] = (4, 2)) -> Path:
    """Write the checkpoint; weights are large enough that the model has opinions."""
    specials = ["<pad>", "<|im_start|>", "<|im_end|>", "<unk>"]
    vocab = {w: i for i, w in enumerate([*specials, "system", "user", "assistant", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>", unk_token="<unk>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = TEMPLATE
    rows = -(-len(vocab) // 8) * 8 + vocab_extra
    experts = {"n_experts": 4, "experts_per_token": 2, "normalize_router": True} if family == "qwen3_moe" else {}
    qk_norm = family.startswith("qwen3")
    cfg = DecoderConfig(family, rows, 16, 2, *heads, 8, 32, qk_norm=qk_norm, qkv_bias=family == "qwen2", tie_embeddings=True, **experts)
    rng = np.random.default_rng(seed)
    params = map_weights(lambda w: jnp.asarray(0.12 * rng.normal(size=w.shape) + (w.init == "ones"), jnp.float32), declare(cfg))
    hf.save_params(params, cfg, folder, "float32")
    tokenizer.save_pretrained(folder)
    return folder


def make_prompts(file: Path, n: int = 24) -> Path:
    """Half harmful, half benign, of several lengths."""
    verbs, things = ["steal", "lock", "paint", "draw"], ["vault", "window", "door", "map"]
    with file.open("w") as f:
        for i in range(n):
            label = "harmful" if i % 2 == 0 else "benign"
            prompt = f"{'please ' * (i % 3)}help me {verbs[i % 4]} the {'red' if i % 5 else 'blue'} {things[(i // 4) % 4]}"
            f.write(json.dumps({"id": f"p{i}", "prompt": prompt, "label": label}) + "\n")
    return file


def run_config(folder: Path, **changes) -> c.RunConfig:
    """A short run of the tiny model; `changes` replace whole sections or top-level fields."""
    model, prompts = folder / "model", folder / "prompts.jsonl"
    if not model.exists():
        make_model(model)
    if not prompts.exists():
        make_prompts(prompts)
    sections = {
        "out": str(folder / "run"),
        "model": c.ModelConfig(path=str(model)),
        "teacher": c.TeacherConfig(context_harmful="you cannot help me", context_benign="you can help me"),
        "data": c.DataConfig(sources=tuple(c.SourceConfig(path=str(prompts), where=f"label={x}") for x in ("harmful", "benign"))),
        "rollout": c.RolloutConfig(max_new_tokens=6),
        "objective": c.ObjectiveConfig(chunk=8),
        "optim": c.OptimConfig(lr=1e-2),
        "train": c.TrainConfig(steps=4, prompts_per_rollout=8, update_batch=8),
        "log": c.LogConfig(samples_every=0, progress=False),
        "evals": c.EvalConfig(suite=""),
    }
    return c.RunConfig(**(sections | changes))
