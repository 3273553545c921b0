"""Time and peak memory of one mixture-of-experts feed-forward beside `jax.lax.ragged_dot`, every expert on every token, and transformers.

    python benchmarks/experts.py --tokens 2048 --experts 64 --per-token 8 --hidden 512 --width 192 --gradients

Each variant runs in its own process on the same random weights and tokens, in the layout of Qwen3-MoE (Qwen3-30B-A3B has 128 experts,
8 per token, hidden 2048, width 768):

    ours     opsa_jax.models.experts: rows in blocks, each of one expert
    ragged   the same router, then `jax.lax.ragged_dot` on rows sorted by expert
    dense    every expert on every token, weighted with zero where it was not chosen
    torch    Qwen3MoeSparseMoeBlock of transformers, eager (CPU)

The first call (compilation) is not timed. With --rounds the variants take turns in fresh processes. Memory is what the process peaked
at above its inputs; on an accelerator, the device's peak. Ratios are to the first row. floor is the least time of the k chosen experts at
the rate of one large matrix product, measured in the same process.
"""

import argparse
import json

from side_by_side import add_flags, compare, measured, median_seconds

VARIANTS = ("ours", "ragged", "dense", "torch")


def parse() -> argparse.Namespace:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--tokens", type=int, default=2048, help="N")
    ap.add_argument("--experts", type=int, default=64, help="E")
    ap.add_argument("--per-token", type=int, default=8, help="experts of a token, k")
    ap.add_argument("--hidden", type=int, default=512, help="D")
    ap.add_argument("--width", type=int, default=192, help="of each expert, F")
    ap.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    ap.add_argument("--gradients", action="store_true", help="also with respect to tokens and all weights")
    add_flags(ap, VARIANTS)
    return ap.parse_args()


def inputs(args):
    """Tokens [N, D], router [D, E], gate and up [E, D, F], down [E, F, D], float32 NumPy."""
    import numpy as np

    rng = np.random.default_rng(0)
    N, E, D, F = args.tokens, args.experts, args.hidden, args.width
    shapes = ((N, D), (D, E), (E, D, F), (E, D, F), (E, F, D))
    return [rng.standard_normal(s, np.float32) * np.float32(1 if s == (N, D) else s[-2] ** -0.5) for s in shapes]


def jax_call(args):
    """Two functions without arguments that wait for what they compute: (loss, gradients), and one product of as many FLOPs as a pass."""
    import jax
    import jax.numpy as jnp

    from opsa_jax.models.config import DecoderConfig
    from opsa_jax.models.experts import experts_forward
    from opsa_jax.models.params import Layers

    k, E = args.per_token, args.experts
    arrays = [jnp.asarray(x, args.dtype) for x in inputs(args)]
    cfg = DecoderConfig("qwen3_moe", 0, 0, 0, 0, 0, 0, 0, n_experts=E, experts_per_token=k, normalize_router=True)

    def routed(h, router):
        weights, chosen = jax.lax.top_k(jax.nn.softmax((h @ router).astype(jnp.float32)), k)
        return (weights / weights.sum(-1, keepdims=True)).astype(h.dtype), chosen

    def ours(h, router, gate, up, down):
        layer = Layers(*[None] * 6, router_LDE=router, gate_LEDF=gate, up_LEDF=up, down_LEFD=down)
        return experts_forward(h[None], layer, cfg)[0]

    def ragged(h, router, gate, up, down):
        weights, chosen = routed(h, router)
        order = jnp.argsort(chosen.reshape(-1))
        x, sizes = h[order // k], jnp.bincount(chosen.reshape(-1), length=E)
        y = jax.nn.silu(jax.lax.ragged_dot(x, gate, sizes)) * jax.lax.ragged_dot(x, up, sizes)
        y = jax.lax.ragged_dot(y, down, sizes)[jnp.argsort(order)].reshape(*chosen.shape, -1)
        return jnp.einsum("nkd,nk->nd", y, weights)

    def dense(h, router, gate, up, down):
        weights, chosen = routed(h, router)
        weights_NE = jnp.zeros((len(h), E), h.dtype).at[jnp.arange(len(h))[:, None], chosen].set(weights)
        y = jax.nn.silu(jnp.einsum("nd,edf->nef", h, gate)) * jnp.einsum("nd,edf->nef", h, up)
        return jnp.einsum("nef,efd,ne->nd", y, down, weights_NE)

    def loss(*arrays):
        return jnp.sum({"ours": ours, "ragged": ragged, "dense": dense}[args.one](*arrays).astype(jnp.float32) ** 2)

    step = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(5))) if args.gradients else lambda *a: (loss(*a), ()))
    product = jax.jit(jnp.dot)
    a, b = jnp.ones((k * args.tokens, args.hidden), args.dtype), jnp.ones((args.hidden, 3 * args.width), args.dtype)
    return lambda: jax.block_until_ready(step(*arrays)), lambda: jax.block_until_ready(product(a, b))


def torch_call(args):
    import torch
    from transformers import AutoConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    h, router, gate, up, down = (torch.from_numpy(x).to(getattr(torch, args.dtype)) for x in inputs(args))
    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=args.hidden, moe_intermediate_size=args.width, num_experts=args.experts,
        num_experts_per_tok=args.per_token, norm_topk_prob=True, experts_implementation="eager",
    )  # fmt: skip
    block = Qwen3MoeSparseMoeBlock(config).to(h.dtype)
    with torch.no_grad():
        block.gate.weight.copy_(router.T)
        block.experts.gate_up_proj.copy_(torch.cat([gate, up], -1).transpose(1, 2))
        block.experts.down_proj.copy_(down.transpose(1, 2))
    trained = [h.requires_grad_(), *block.parameters()]

    def call():
        with torch.set_grad_enabled(args.gradients):
            loss = block(h[None]).float().square().sum()
        return loss.detach(), torch.autograd.grad(loss, trained) if args.gradients else ()

    return call


def run_one(args) -> None:
    """Measure one variant in this process and print one JSON line."""
    call, product = (torch_call(args), None) if args.one == "torch" else jax_call(args)
    row, (loss, _) = measured(call, args.repeat, on_device=product is not None)
    floor = None
    if product:
        product()
        floor = median_seconds(product, args.repeat)[0] * (3 if args.gradients else 1)  # a backward pass is twice a forward one
    print(json.dumps(row | {"loss": float(loss), "floor": floor}))


def tail(run: dict) -> str:
    floor = f"{run['floor']:9.3f}" if run["floor"] else f"{'-':>9}"
    return f"{floor}  {run['loss']:.6g}"


def main() -> None:
    args = parse()
    if args.one:
        return run_one(args)
    title = f"N {args.tokens}, E {args.experts}, k {args.per_token}, D {args.hidden}, F {args.width}, {args.dtype}, "
    title += f"{'with' if args.gradients else 'without'} gradients"
    compare(args, args.variants, title, f"{'floor s':>9}  loss", tail)


if __name__ == "__main__":
    main()
