"""Drift of representations: how far a model's hidden states on general prompts lie from those of the base (SafeSteer, arXiv 2606.02530).

Every model sees the same records (a teacher with its own context), so states are paired by record. Two principal components are fitted
on the base's states alone; distances are in units of the base's spread.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from opsa_jax.analysis.token_kl import View, bucket
from opsa_jax.data.chat import left_pad
from opsa_jax.errors import UserError
from opsa_jax.models.transformer import forward, prompt_inputs
from opsa_jax.parallel.mesh import current_shards, round_up

Where = Literal["prompt", "response"]


def check_layer(layer: int, n_layers: int) -> None:
    """
    Raises:
        UserError: a layer that the model does not have.
    """
    if not -1 <= layer < n_layers:
        raise UserError(f"--layer {layer}: allowed: 0 to {n_layers - 1} (input of that block), or -1 (after the last norm)")


def hidden_states(view: View, responses: Sequence[Sequence[int]] | None = None, layer: int = -1, batch: int = 16) -> np.ndarray:
    """One vector per record.

    Args:
        view: model and prompts.
        responses: with them, the mean over the response tokens that follow each prompt (at least one token each); None takes the
            last prompt token.
        layer: input of this block, or -1 for the final state after the last norm.
        batch: rows at a time; rounded up to what the mesh divides.

    Returns:
        [N, D] float64.

    Raises:
        UserError: no such layer.
    """
    check_layer(layer, view.cfg.n_layers)
    batch = round_up(batch, current_shards())
    tails = [[] for _ in view.prompts] if responses is None else responses
    rows = [[*p, *r] for p, r in zip(view.prompts, tails, strict=True)]
    width = bucket(max(map(len, rows), default=1))
    found = []
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        filler = batch - len(some)
        ids_BT, mask_BT = left_pad(some + [[0]] * filler, width, 0)
        # Columns that are averaged, counted from the right end: all rows end there.
        counts_B = np.array([max(len(t), 1) for t in tails[start : start + batch]] + [1] * filler, np.int32)
        found.append(np.asarray(_states(view.params, view.cfg, ids_BT, mask_BT, counts_B, layer, view.steer_LD), np.float64)[: len(some)])
    return np.concatenate(found)


@functools.partial(jax.jit, static_argnums=(1, 5))
def _states(params, cfg, ids_BT, mask_BT, counts_B, layer, steer_LD):
    T = ids_BT.shape[1]
    capture_C = None if layer < 0 else jnp.arange(T)
    out = forward(params, cfg, ids_BT, *prompt_inputs(mask_BT), steer_LD=steer_LD, capture_C=capture_C)
    states_BTD = (out.hidden_BTD if layer < 0 else out.captured_LBCD[layer]).astype(jnp.float32)
    chosen_BT = jnp.arange(T)[None, :] >= T - counts_B[:, None]
    return jnp.sum(states_BTD * chosen_BT[..., None], axis=1) / counts_B[:, None]


def drift(states: Mapping[str, np.ndarray], base: str = "base") -> dict[str, Any]:
    """Where the models' states lie, seen from the base.

    Args:
        states: [N, D] by model; row i of all belongs to record i.
        base: the model that components and units are taken from.

    Returns:
        `explained`: shares of the base's variance that the two components hold. `models`: for each model

        - `points` [N][2]: projections, in units of the base's standard deviation along each component;
        - `distance`: |mean - base mean| / base spread, the spread being the root of the summed variances (all D dimensions);
        - `displacement`: mean over records of |state - base state of the same record| / base spread;
        - `wasserstein` [2]: 1-D Wasserstein distance to the base along each component, in its standard deviations.

    Raises:
        UserError: fewer than three records, or base states that do not differ.
    """
    reference = np.asarray(states[base], np.float64)
    if len(reference) < 3:
        raise UserError(f"drift needs at least 3 general prompts, there are {len(reference)}; give more")
    centre = reference.mean(0)
    spread = float(np.sqrt(((reference - centre) ** 2).sum(1).mean()))
    if spread == 0:
        raise UserError("drift: the base has the same state for every prompt; take another --layer or --drift-at response")
    _, scales, axes = np.linalg.svd(reference - centre, full_matrices=False)
    axes = axes[:2] * np.where(axes[:2][np.arange(2), np.abs(axes[:2]).argmax(1)] < 0, -1, 1)[:, None]  # a sign that does not flip
    unit = np.maximum(scales[:2] / np.sqrt(len(reference)), 1e-12 * spread)
    home = (reference - centre) @ axes.T / unit
    models = {}
    for name, x in states.items():
        x = np.asarray(x, np.float64)
        points = (x - centre) @ axes.T / unit
        models[name] = {
            "points": points.tolist(),
            "distance": float(np.linalg.norm(x.mean(0) - centre)) / spread,
            "displacement": float(np.linalg.norm(x - reference, axis=1).mean()) / spread,
            "wasserstein": [wasserstein(points[:, k], home[:, k]) for k in range(2)],
        }
    return {"explained": (scales[:2] ** 2 / (scales**2).sum()).tolist(), "models": models}


def wasserstein(a: np.ndarray, b: np.ndarray) -> float:
    """1-D Wasserstein distance of two samples of the same size: the mean distance of their order statistics.

    >>> wasserstein(np.array([0.0, 1.0]), np.array([3.0, 2.0]))
    2.0
    """
    return float(np.abs(np.sort(a) - np.sort(b)).mean())
