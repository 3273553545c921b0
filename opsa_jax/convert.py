"""Import, export or verify a checkpoint in Hugging Face format.

    python -m opsa_jax.convert import Qwen/Qwen3-0.6B                      what it is; every tensor is checked
    python -m opsa_jax.convert import Qwen/Qwen3-0.6B --out models/qwen3   and a clean copy of it
    python -m opsa_jax.convert export runs/a --out trained                 the last checkpoint of a run
    python -m opsa_jax.convert export base --adapter runs/a/adapter --out merged
    python -m opsa_jax.convert verify models/qwen3                         round trip bit for bit, logits against transformers
"""

import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh

from opsa_jax.cli import entry, parse
from opsa_jax.config import MeshConfig
from opsa_jax.errors import UserError
from opsa_jax.models import lora
from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.hf import checkpoint_dtype, fetch, load_config, load_params, open_weights, save_params
from opsa_jax.models.params import Params, count, head_weight
from opsa_jax.models.transformer import forward, prompt_inputs
from opsa_jax.parallel.mesh import make_mesh

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Import:
    """Check a checkpoint and print what it is; with --out, write a clean copy (safetensors, one dtype, tokenizer, no code)."""

    path: tyro.conf.Positional[str]
    """A local folder in Hugging Face format, a hub name (org/name), or sandbox:base."""
    revision: str = "main"
    """Branch, tag or commit of a hub checkpoint."""
    out: str = ""
    """Folder to write; it must not exist. Empty: check only."""
    dtype: Dtype = "auto"
    """Dtype of the copy; auto keeps the checkpoint's."""
    shard_gb: float = 5.0
    """Largest weight file of the copy, in 10^9 bytes."""


@dataclass(frozen=True)
class Export:
    """Write a run or a checkpoint as one Hugging Face folder, with a LoRA adapter merged into its weights if one is given."""

    path: tyro.conf.Positional[str]
    """A run directory (its last checkpoint is written), a local folder in Hugging Face format, a hub name, or sandbox:base."""
    out: str
    """Folder to write; it must not exist."""
    revision: str = "main"
    """Branch, tag or commit of a hub checkpoint."""
    adapter: str = ""
    """Folder of a PEFT LoRA adapter to merge."""
    dtype: Dtype = "auto"
    """Dtype of the weights; auto keeps the checkpoint's."""
    shard_gb: float = 5.0
    """Largest weight file, in 10^9 bytes."""


@dataclass(frozen=True)
class Verify:
    """Load, write again, load again: every tensor must return bit for bit. With torch installed, also compare logits with transformers."""

    path: tyro.conf.Positional[str]
    """A local folder in Hugging Face format, a hub name, or sandbox:base."""
    revision: str = "main"
    """Branch, tag or commit of a hub checkpoint."""
    tokens: int = 32
    """Length of the two random rows whose logits are compared."""
    tolerance: float = 1e-3
    """Largest difference from the logits of transformers (float32), relative to the largest logit."""
    scratch: str = ""
    """Where the second copy is written for the time of the check; empty is the system's folder for temporary files."""


@dataclass(frozen=True)
class Source:
    """A model to convert, in memory."""

    params: Params
    cfg: DecoderConfig
    raw: dict[str, Any]
    """Its config.json."""
    folder: Path
    dtype: str
    """Dtype of its files, in which the weights were loaded."""


def load_source(path: str, revision: str, mesh: Mesh) -> Source:
    """The model at `path`, with the weights exactly as stored.

    Raises:
        UserError: no checkpoint there, or one that does not match its config.json.
    """
    cfg, raw = load_config(path, revision)
    folder = fetch(path, revision)
    dtype = checkpoint_dtype(folder)
    return Source(load_params(folder, cfg, dtype, mesh), cfg, raw, folder, dtype)


def describe(source: Source) -> str:
    """One line: architecture, size, dtype."""
    cfg = source.cfg
    heads = f"{cfg.n_heads} heads of {cfg.head_dim} ({cfg.n_kv_heads} key-value)"
    shape = f"{cfg.n_layers} layers, d_model {cfg.d_model}, {heads}, vocabulary {cfg.vocab_size}"
    return f"{source.raw['model_type']}: {shape}, {count(source.params):,} parameters, {source.dtype}"


def write(source: Source, out: str, dtype: str, shard_gb: float) -> None:
    """Save to a new folder and say so."""
    dtype = source.dtype if dtype == "auto" else dtype
    shard_bytes = int(shard_gb * 10**9)
    save_params(source.params, source.cfg, Path(out), dtype, source.raw, tokenizer_from=source.folder, max_shard_bytes=shard_bytes)
    print(f"wrote {out} ({dtype})")


def probe(cfg: DecoderConfig, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Two rows of random token ids [2, T] and their mask: one full, one left-padded for half of it."""
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, length))
    mask = np.ones_like(tokens)
    mask[1, : length // 2] = 0
    return tokens, mask


def logits(params: Params, cfg: DecoderConfig, tokens_BT, mask_BT) -> np.ndarray:
    """Logits [B, T, V] of the whole sequences, all in float32."""
    with jax.default_matmul_precision("highest"):
        return np.asarray(_logits(params, replace(cfg, compute_dtype="float32"), jnp.asarray(tokens_BT), jnp.asarray(mask_BT)))


@partial(jax.jit, static_argnums=1)
def _logits(params: Params, cfg: DecoderConfig, tokens_BT, mask_BT) -> jax.Array:
    hidden_BTD = forward(params, cfg, tokens_BT, *prompt_inputs(mask_BT)).hidden_BTD
    return hidden_BTD @ head_weight(params).astype(jnp.float32)


def same_tensors(first: Path, second: Path) -> int:
    """Number of tensors in the second checkpoint, all of which the first has with the same bits.

    Raises:
        UserError: one that differs.
    """
    theirs, ours = open_weights(first), open_weights(second)
    for key, stored in ours.items():
        a, b = theirs[key].read(), stored.read()
        if a.dtype != b.dtype or not np.array_equal(a.view(np.uint8), b.view(np.uint8)):
            raise UserError(f"{first}: tensor {key} is {a.dtype} and does not survive a round trip (written as {b.dtype})")
    return len(ours)


def verify(command: Verify, mesh: Mesh) -> int:
    """Round trip and logits; prints one line per check."""
    source = load_source(command.path, command.revision, mesh)
    print(describe(source))
    tokens, mask = probe(source.cfg, command.tokens)
    ours = logits(source.params, source.cfg, tokens, mask)
    with tempfile.TemporaryDirectory(dir=command.scratch or None) as scratch:
        copy = Path(scratch) / "copy"
        save_params(source.params, source.cfg, copy, source.dtype, source.raw)
        print(f"round trip: {same_tensors(source.folder, copy)} tensors equal bit for bit")
        again = load_params(copy, source.cfg, source.dtype, mesh)
        if not np.array_equal(logits(again, source.cfg, tokens, mask), ours):
            raise UserError(f"{source.folder}: logits change after a round trip")
        print("round trip: logits equal bit for bit")
    theirs = transformers_logits(source.folder, tokens, mask)
    if theirs is None:
        print("transformers: not compared (torch is not installed)")
        return 0
    real = mask == 1
    difference, largest = np.abs(ours - theirs)[real].max(), np.abs(theirs)[real].max()
    print(f"transformers: largest difference of logits {difference:.2e} (largest logit {largest:.2f})")
    if not difference <= command.tolerance * largest:
        raise UserError(f"{source.folder}: logits differ from transformers by more than {command.tolerance} of the largest")
    return 0


def transformers_logits(folder: Path, tokens, mask) -> np.ndarray | None:
    """Logits of the same model in transformers, float32; None without torch."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        return None
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask)).logits.numpy()


Command = (
    Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
)


def main(argv: list[str] | None = None) -> int:
    """Entry point of `python -m opsa_jax.convert`."""
    command = parse(Command, None, argv, "python -m opsa_jax.convert", __doc__)
    if getattr(command, "out", "") and Path(command.out).exists():
        raise UserError(f"--out {command.out} exists; choose another folder or remove it first")
    if isinstance(command, Export) and (Path(command.path) / "checkpoints").is_dir():
        from opsa_jax.session import export_run

        export_run(Path(command.path), Path(command.out), command.dtype)
        return 0
    mesh = make_mesh(MeshConfig())
    if isinstance(command, Verify):
        return verify(command, mesh)
    source = load_source(command.path, command.revision, mesh)
    print(describe(source))
    if isinstance(command, Export) and command.adapter:
        adapters, config = lora.load_adapter(Path(command.adapter), source.cfg, mesh)
        source = replace(source, params=lora.merge(lora.attach(source.params, adapters)))
        print(f"merged {command.adapter} (rank {config.rank}, alpha {config.alpha:g}, {' '.join(config.targets)})")
    if command.out:
        write(source, command.out, command.dtype, command.shard_gb)
    return 0


if __name__ == "__main__":
    raise SystemExit(entry(main))
