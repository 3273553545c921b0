"""Decode throughput of the sampler beside `transformers.generate`, on the same random model, in alternating runs.

    taskset -c 0 python benchmarks/decode.py                          # one core for both, the peer on CPU
    python benchmarks/decode.py --vocab 151936 --batch 16             # dominated by the vocabulary
    python benchmarks/decode.py --no-peer --new-tokens 1024           # ours alone, on whatever device jax finds

Compilation and a warm-up run are left out. No row stops early (no stop token), so both sides do the same work. Times are medians of
CPU seconds on CPU, where the machine may be shared, and of wall seconds on accelerators. `floor` is the time that the weights and the
cache take to read once per step, or the multiplications to do, whichever is longer, at the speeds of a large sum and a large matrix
product measured on the same device just before; `of floor` is floor / measured.
"""

import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from opsa_jax.models import hf
from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.params import Params, init_params
from opsa_jax.rollout.filters import Sampling
from opsa_jax.rollout.sampler import row_keys, sample


@dataclass(frozen=True)
class Benchmark:
    width: int = 256
    """Width of the residual stream."""
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    ff: int = 768
    """Units of the feed-forward part."""
    vocab: int = 4096
    batch: int = 16
    prompt_tokens: int = 32
    new_tokens: int = 128
    temperature: float = 1.0
    """0 is greedy; then the tokens of both sides are compared as well."""
    top_k: int = 0
    top_p: float = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    scan_unroll: int = 1
    """Blocks per iteration of our layer scan."""
    runs: int = 5
    """Timed runs of each side."""
    threads: int = 1
    """torch threads; pin the process with taskset to give XLA as many cores."""
    peer: bool = True
    """Also time transformers."""


def main(b: Benchmark) -> None:
    cfg = DecoderConfig(
        "qwen3", b.vocab, b.width, b.layers, b.heads, b.kv_heads, b.head_dim, b.ff, qk_norm=True, tie_embeddings=True,
        compute_dtype=b.dtype, scan_unroll=b.scan_unroll,
    )  # fmt: skip
    params = init_params(cfg, jax.random.key(0), b.dtype)
    ids_BP = np.random.default_rng(0).integers(0, b.vocab, (b.batch, b.prompt_tokens)).astype(np.int32)
    sides = {"ours": ours(b, cfg, params, ids_BP)}
    if b.peer:
        sides["transformers"] = theirs(b, cfg, params, ids_BP)
    on_cpu = jax.default_backend() == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    tokens = {name: run() for name, run in sides.items()}  # compiles and warms up
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(b.runs):
        for name, run in sides.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    low = floor_seconds(b, cfg)
    result = {
        "device": jax.devices()[0].device_kind,
        "clock": "CPU seconds" if on_cpu else "wall seconds",
        "seconds": {name: [round(t, 4) for t in sorted(times)] for name, times in seconds.items()},
        "tokens_per_second": {name: round(b.batch * b.new_tokens / t) for name, t in medians.items()},
        "floor_seconds": round(low, 4),
        "of_floor": {name: round(low / t, 3) for name, t in medians.items()},
    }
    if b.peer:
        result["ratio"] = round(medians["transformers"] / medians["ours"], 2)
        if b.temperature == 0:
            result["equal_tokens"] = float(np.mean(tokens["ours"] == tokens["transformers"]))
    print(json.dumps(result, indent=2))


def ours(b: Benchmark, cfg: DecoderConfig, params: Params, ids_BP: np.ndarray):
    keys_B = row_keys(jax.random.key(0), "benchmark", 0, jnp.arange(b.batch), jnp.zeros(b.batch, jnp.int32))
    sampling = Sampling(b.temperature, b.top_k, b.top_p)

    def run() -> np.ndarray:
        return np.asarray(sample(params, cfg, sampling, (), b.new_tokens, ids_BP, np.ones_like(ids_BP), keys_B).response_ids_BR)

    return run


def theirs(b: Benchmark, cfg: DecoderConfig, params: Params, ids_BP: np.ndarray):
    import torch
    import transformers

    torch.set_num_threads(b.threads)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        hf.save_params(params, cfg, Path(folder) / "model", b.dtype)
        model = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=getattr(torch, b.dtype)).eval()
    model.generation_config.eos_token_id = None
    chosen = {"do_sample": False} if b.temperature == 0 else {"temperature": b.temperature, "top_k": b.top_k, "top_p": b.top_p}
    options = transformers.GenerationConfig(max_new_tokens=b.new_tokens, pad_token_id=0, **({"do_sample": True} | chosen))
    ids, mask = torch.tensor(ids_BP, dtype=torch.int64), torch.ones(ids_BP.shape, dtype=torch.int64)

    def run() -> np.ndarray:
        return model.generate(ids, attention_mask=mask, generation_config=options)[:, b.prompt_tokens :].numpy()

    return run


def floor_seconds(b: Benchmark, cfg: DecoderConfig) -> float:
    """Decoding of all tokens at the device's own speed; prefill left out."""
    size = jnp.dtype(b.dtype).itemsize
    columns = b.prompt_tokens + b.new_tokens / 2
    cache = 2 * cfg.n_layers * cfg.n_kv_heads * cfg.head_dim * columns
    bytes_per_step = size * (cfg.n_params + b.batch * cache)
    flops_per_step = 2 * b.batch * (cfg.n_params + 2 * cfg.n_layers * cfg.n_heads * cfg.head_dim * columns)
    big, square = jnp.ones(1 << 26, b.dtype), jnp.ones((1024, 1024), b.dtype)
    bandwidth = big.nbytes / best_seconds(jax.jit(jnp.max), big)
    flops = 2 * 1024**3 / best_seconds(jax.jit(jnp.matmul), square, square)
    return b.new_tokens * max(bytes_per_step / bandwidth, flops_per_step / flops)


def best_seconds(f, *args) -> float:
    times = []
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(f(*args))
        times.append(time.perf_counter() - start)
    return min(times[1:])


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main(tyro.cli(Benchmark, description=__doc__))
