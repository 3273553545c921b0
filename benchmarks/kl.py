"""Time and peak memory of the chunked KL loss with its gradients, beside materialised versions in JAX and torch, and TRL's chunked one.

    python benchmarks/kl.py --tokens 1024 --hidden 512 --vocab 151936 --chunk 128

Each variant runs in its own process: value, and gradient in the student's hidden states and head, of

    sum over tokens of 0.5 KL(teacher, student) + 0.5 KL(student, teacher) over the whole vocabulary

on the same random inputs: `ours` chunked, `jax` and `torch` materialised, `trl` chunked (the last two only where installed, and on the
CPU). TRL has no such mixture, so its row is two calls, one for each KL; `trl one call` is reverse KL alone, a cheaper objective.

The first call (compilation) is not timed. With --rounds the variants take turns in fresh processes. Memory is what the process peaked
at above its inputs; on an accelerator, the device's peak. Ratios are to the first row.
"""

import argparse
import json
from importlib.util import find_spec

from side_by_side import add_flags, compare, measured

VARIANTS = ("ours", "jax", "torch", "trl", "trl one call")


def parse() -> argparse.Namespace:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--tokens", type=int, default=1024, help="positions, N")
    ap.add_argument("--hidden", type=int, default=512, help="width of the hidden states, D")
    ap.add_argument("--vocab", type=int, default=32768, help="entries of the vocabulary, V")
    ap.add_argument("--chunk", type=int, default=128, help="positions whose logits exist at the same time in ours")
    ap.add_argument("--weighted", type=float, default=1.0, help="share of the positions with a weight above 0")
    ap.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of hidden states and heads")
    add_flags(ap, VARIANTS)
    return ap.parse_args()


def inputs(args):
    """Hidden states [N, D] and heads [D, V] of student and teacher, weights [N], float32 NumPy; logits have a spread of about 3."""
    import numpy as np

    rng = np.random.default_rng(0)
    hidden = [rng.standard_normal((args.tokens, args.hidden), np.float32) for _ in range(2)]
    heads = [rng.standard_normal((args.hidden, args.vocab), np.float32) * np.float32(3 * args.hidden**-0.5) for _ in range(2)]
    w_N = (np.arange(args.tokens) < round(args.weighted * args.tokens)).astype(np.float32)
    return hidden[0], heads[0], hidden[1], heads[1], rng.permutation(w_N)


def jax_call(args):
    """A function without arguments that computes (loss, gradients) and waits for them."""
    import jax
    import jax.numpy as jnp

    from opsa_jax.config import ObjectiveConfig
    from opsa_jax.objectives.chunked import chunked_divergence

    *arrays, w_N = inputs(args)
    arrays, w_N = [jnp.asarray(x, args.dtype) for x in arrays], jnp.asarray(w_N)
    cfg = ObjectiveConfig(divergence="mix", mix=0.5, chunk=args.chunk)
    ids_N = jnp.zeros(args.tokens, jnp.int32)

    def ours(hs, head_s, ht, head_t):
        return chunked_divergence(cfg, hs, head_s, ht, head_t, w_N, ids_N, train_head=True)

    def materialised(hs, head_s, ht, head_t):
        logits = [jnp.dot(h, head, preferred_element_type=jnp.float32) for h, head in ((hs, head_s), (ht, head_t))]
        logp_s, logp_t = (jax.nn.log_softmax(x) for x in logits)
        return 0.5 * jnp.sum(w_N * jnp.sum((jnp.exp(logp_t) - jnp.exp(logp_s)) * (logp_t - logp_s), axis=-1)), None

    step = jax.jit(jax.value_and_grad(ours if args.one == "ours" else materialised, argnums=(0, 1), has_aux=True))

    def call():
        (loss, _), gradients = jax.block_until_ready(step(*arrays))
        return loss, gradients

    return call


def torch_call(args):
    import torch

    *arrays, w_N = (torch.from_numpy(x) for x in inputs(args))
    hs, head_s, ht, head_t = (x.to(getattr(torch, args.dtype)) for x in arrays)
    hs.requires_grad_(), head_s.requires_grad_()

    def materialised():
        logp_s, logp_t = (torch.log_softmax((h @ head).float(), -1) for h, head in ((hs, head_s), (ht, head_t)))
        return 0.5 * (w_N * ((logp_t.exp() - logp_s.exp()) * (logp_t - logp_s)).sum(-1)).sum()

    loss_of = materialised
    if args.one != "torch":
        from trl.trainer.distillation_trainer import _chunked_divergence_loss

        def one(beta):
            return _chunked_divergence_loss(hs[None], ht[None], head_s.T, head_t.T, w_N[None], beta=beta, num_items_in_batch=1)[0]

        loss_of = (lambda: one(1.0)) if args.one == "trl one call" else (lambda: 0.5 * one(0.0) + 0.5 * one(1.0))

    def call():
        loss = loss_of()
        return loss.detach(), torch.autograd.grad(loss, (hs, head_s))

    return call


def run_one(args) -> None:
    """Measure one variant in this process and print one JSON line."""
    import numpy as np

    ours = args.one in ("ours", "jax")
    row, (loss, gradients) = measured((jax_call if ours else torch_call)(args), args.repeat, on_device=ours)
    # Norms in float64: torch's float32 norm of so many numbers is off by a percent.
    norms = [float(np.linalg.norm(np.asarray(g.float() if hasattr(g, "float") else g, np.float64))) for g in gradients]
    print(json.dumps(row | {"loss": float(loss), "norms": norms}))


def installed(variant: str) -> bool:
    return find_spec({"ours": "jax", "jax": "jax", "torch": "torch"}.get(variant, "trl")) is not None


def tail(run: dict) -> str:
    return f"   {run['loss']:.6f}  {' '.join(f'{n:.6g}' for n in run['norms'])}"


def main() -> None:
    args = parse()
    if args.one:
        return run_one(args)
    chosen = [v for v in args.variants if installed(v)]
    for variant in sorted(set(args.variants) - set(chosen)):
        print(f"{variant}: not installed, left out")
    title = f"N {args.tokens} ({args.weighted:.0%} weighted), D {args.hidden}, V {args.vocab}, chunk {args.chunk}, {args.dtype}"
    compare(args, chosen, title, "   loss, gradient norms in hidden and head", tail)


if __name__ == "__main__":
    main()
