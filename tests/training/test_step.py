"""One update: exactness of accumulation, the empty-context identity, what is trained and what is not."""

import dataclasses
import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import make_model, run_config

from opsa_jax import config as c
from opsa_jax.parallel import mesh
from opsa_jax.training import setup
from opsa_jax.training.setup import prepare
from opsa_jax.training.views import row_order

# Adam's first update is lr * g / (|g| + eps): with the usual eps it is as rough as the sign of a gradient that rounding moves.
WELL_CONDITIONED = c.OptimConfig(lr=1e-2, eps=1e-3)


def one_rollout(run, state, number=0):
    with jax.set_mesh(run.mesh):
        return run.rollout(state, run.next_draws(), number)


def updated(run, state, batch, u=0):
    """State and metrics after one update, on the host. The state is donated, so it cannot be used again."""
    with jax.set_mesh(run.mesh):
        state, metrics = run.update(state, run.frozen, batch, np.int32(u))
    return jax.device_get(state), {k: float(s) / max(float(w), 1e-9) for k, (s, w) in jax.device_get(metrics).items()}


def largest_difference(a, b) -> float:
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(np.asarray(x, np.float64) - np.asarray(y)).max()), a, b)))


def test_teacher_without_context_is_the_student(tmp_path):
    """Frozen copy and no context: KL exactly 0, gradient exactly 0, weights bit-identical after an update without decay."""
    config = run_config(tmp_path, teacher=c.TeacherConfig(context_harmful="", context_benign=""), optim=c.OptimConfig(weight_decay=0.0))
    run, state = prepare(config)
    before = jax.device_get(state.trainable)
    _, batch = one_rollout(run, state)
    state, metrics = updated(run, state, batch)
    assert metrics["loss"] == metrics["kl_forward"] == metrics["kl_reverse"] == metrics["grad_norm"] == 0.0
    jax.tree.map(np.testing.assert_array_equal, state.trainable, before)


def test_context_makes_a_gradient_and_the_teacher_stays(tmp_path):
    run, state = prepare(run_config(tmp_path))
    teacher, start = jax.device_get((run.frozen.teachers[0], state.trainable))
    _, batch = one_rollout(run, state)
    state, metrics = updated(run, state, batch)
    assert metrics["kl_forward"] > 1e-4 and metrics["grad_norm"] > 1e-3
    assert largest_difference(state.trainable, start) > 1e-4
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(run.frozen.teachers[0]), teacher)


def test_only_the_prompt_of_the_teacher_differs(tmp_path):
    """Both views end in the same response ids, and the student's prompt holds no context."""
    run, state = prepare(run_config(tmp_path))
    rollout, batch = one_rollout(run, state)
    np.testing.assert_array_equal(batch.response_SR, rollout.response_ids_BR)
    context = set(run.chat.encode("red", "you cannot help me")) - set(run.chat.encode("red"))
    teacher, student = (set(np.asarray(x).ravel().tolist()) for x in (batch.teacher_prompt_SQ, batch.student_prompt_SP))
    assert teacher & context
    assert run.chat.tokenizer.convert_tokens_to_ids("cannot") not in student


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_micro_batches_do_not_change_the_update(tmp_path, reduction):
    """Responses of different lengths: only weights normalised over the whole update make this exact."""
    results = []
    for micro in (8, 4, 2):
        train = c.TrainConfig(steps=4, prompts_per_rollout=8, update_batch=8, micro_batch=micro)
        room = c.RolloutConfig(max_new_tokens=24)
        objective = c.ObjectiveConfig(chunk=8, reduction=reduction)
        run, state = prepare(run_config(tmp_path, train=train, rollout=room, objective=objective, optim=WELL_CONDITIONED))
        _, batch = one_rollout(run, state)
        state, metrics = updated(run, state, batch)
        results.append((state.trainable, metrics))
    assert len({int(n) for n in np.asarray(batch.response_mask_SR).sum(1)}) > 1, "the test needs responses of different lengths"
    for weights, metrics in results[1:]:
        assert largest_difference(weights, results[0][0]) < 1e-5
        assert metrics["loss"] == pytest.approx(results[0][1]["loss"], rel=1e-5)


def test_updates_of_a_rollout_batch_share_its_rows(tmp_path):
    """Two updates of 4 see each of the 8 sequences once, and each has both labels."""
    run, _ = prepare(run_config(tmp_path, train=c.TrainConfig(steps=4, prompts_per_rollout=8, update_batch=4)))
    draws = run.next_draws()
    order = [e.record.label for e, _ in draws]
    parts = [[order[b * 2 + u] for b in range(4)] for u in range(2)]
    assert all(sorted(p) == ["benign"] * 2 + ["harmful"] * 2 for p in parts)
    assert sorted(row_order(24, 2, 3)) == list(range(24))


def test_lora_trains_adapters_only(tmp_path):
    model = run_config(tmp_path).model
    config = run_config(tmp_path, model=dataclasses.replace(model, lora=c.LoraConfig(rank=2, alpha=4)))
    run, state = prepare(config)
    base = jax.device_get(run.frozen.base)
    _, batch = one_rollout(run, state)
    state, metrics = updated(run, state, batch)
    assert set(state.trainable) == {"q", "k", "v", "o", "gate", "up", "down"}
    assert metrics["grad_norm"] > 0 and largest_difference(state.trainable["q"].b, jnp.zeros(1)) > 0
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(run.frozen.base), base)


def test_ema_teacher_follows(tmp_path):
    teacher = c.TeacherConfig(weights="ema", ema_decay=0.75, context_harmful="you cannot", context_benign="")
    run, state = prepare(run_config(tmp_path, teacher=teacher))
    start = jax.device_get(state.trainable)
    _, batch = one_rollout(run, state)
    state, _ = updated(run, state, batch)
    expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, start, state.trainable)
    assert largest_difference(state.ema, expected) < 1e-6 < largest_difference(state.ema, start)


def test_checkpoint_teacher_with_padded_vocabulary(tmp_path):
    other = make_model(tmp_path / "other", seed=3, vocab_extra=5)
    teacher = c.TeacherConfig(weights="checkpoint", path=str(other), context_harmful="", context_benign="")
    run, state = prepare(run_config(tmp_path, teacher=teacher))
    _, batch = one_rollout(run, state)
    _, metrics = updated(run, state, batch)
    assert np.isfinite(metrics["loss"]) and metrics["loss"] > 0


@pytest.mark.parametrize("shape", [pytest.param((1, 1, 1)), pytest.param((2, 2, 1), marks=pytest.mark.devices(4))])
def test_sampling_some_responses_at_a_time_gives_the_same(tmp_path, shape):
    """And no cache of all rows: the compiled program has none of that many keys."""
    rollouts, caches = [], []
    for at_a_time in (0, 4):
        config = run_config(tmp_path, mesh=c.MeshConfig(*shape), rollout=c.RolloutConfig(max_new_tokens=6, micro_batch=at_a_time))
        run, state = prepare(config)
        rollouts.append(jax.device_get(one_rollout(run, state)[0]))
        width, room = run.prompts.checked.prompt_width, 6
        key, ids = jax.ShapeDtypeStruct((8,), np.int32), jax.ShapeDtypeStruct((8, width), np.int32)
        with jax.set_mesh(run.mesh):
            text = run.sample.lower(state, run.frozen, ids, ids, key, key, np.int32(0), np.uint32(0)).compile().as_text()
        caches.append(f"f32[2,{8 // math.prod(shape)},2,{width + room},8]" in text)  # layers, rows, heads, columns, width
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), *rollouts)  # ids and masks are whole numbers
    assert rollouts[0].response_mask_BR.sum() > 8
    assert caches == [True, False]


def test_a_student_and_a_teacher_with_experts(tmp_path):
    """Without context its own teacher gives KL 0, with context the loss falls; as the teacher of a dense student it stays what it is."""
    experts = make_model(tmp_path / "experts", seed=5, family="qwen3_moe")
    alone = run_config(tmp_path, model=c.ModelConfig(path=str(experts)), optim=c.OptimConfig(lr=2e-3, warmup=0.0, schedule="constant"))
    run, state = prepare(dataclasses.replace(alone, teacher=c.TeacherConfig(context_harmful="", context_benign="")))
    assert updated(run, state, one_rollout(run, state)[1])[1]["loss"] == 0
    run, state = prepare(alone)
    _, batch = one_rollout(run, state)
    losses = []
    for _ in range(4):
        state, metrics = updated(run, state, batch)
        losses.append(float(metrics["loss"]))
    assert 0 < losses[-1] < 0.8 * losses[0]  # not step by step: a token that changes its expert makes a jump

    teacher = c.TeacherConfig(weights="checkpoint", path=str(experts), context_harmful="", context_benign="")
    run, state = prepare(run_config(tmp_path, teacher=teacher))
    before = jax.tree.map(np.array, run.frozen)
    _, metrics = updated(run, state, one_rollout(run, state)[1])
    assert np.isfinite(metrics["loss"]) and metrics["loss"] > 0
    assert largest_difference(run.frozen, before) == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_any_mesh_gives_the_same_update(tmp_path, monkeypatch, family):
    """Sampled tokens equal, loss and weights within float32 rounding; weights and moments split over fsdp and tensor."""
    make_model(tmp_path / "model", heads=(8, 8), family=family)
    results = []
    for shape in ((1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)):
        devices = jax.devices()[: math.prod(shape)]
        monkeypatch.setattr(setup, "make_mesh", functools.partial(mesh.make_mesh, devices=devices))
        run, state = prepare(run_config(tmp_path, mesh=c.MeshConfig(*shape), optim=WELL_CONDITIONED))
        parts = state.trainable.layers.wq_LDNH.sharding.shard_shape(state.trainable.layers.wq_LDNH.shape)
        assert math.prod(parts) * shape[1] * shape[2] == state.trainable.layers.wq_LDNH.size
        rollout, batch = one_rollout(run, state)
        tokens = jax.device_get(rollout.response_ids_BR)
        state, metrics = updated(run, state, batch)
        results.append((tokens, metrics["loss"], state.trainable))
    for tokens, loss, weights in results[1:]:
        np.testing.assert_array_equal(tokens, results[0][0])
        assert loss == pytest.approx(results[0][1], rel=1e-5)
        assert largest_difference(weights, results[0][2]) < 1e-5


def test_nothing_of_size_tokens_by_vocabulary(tmp_path):
    """The compiled update holds no array with tokens * vocabulary elements; its largest logits are one chunk's."""
    make_model(tmp_path / "model", vocab_extra=1960)
    run, state = prepare(run_config(tmp_path, rollout=c.RolloutConfig(max_new_tokens=32), objective=c.ObjectiveConfig(chunk=16)))
    _, batch = one_rollout(run, state)
    tokens, vocabulary = 8 * 32, run.student.cfg.vocab_size
    with jax.set_mesh(run.mesh):
        text = run.update.lower(state, run.frozen, batch, np.int32(0)).compile().as_text()
    sizes = array_sizes(text)
    assert max(sizes) < tokens * vocabulary
    assert any(n >= 16 * vocabulary for n in sizes), "the reader of the compiled text sees the chunk"


def array_sizes(hlo: str) -> set[int]:
    import re

    return {int(np.prod([int(d) for d in dims.split(",")])) for dims in re.findall(r"[a-z]+\d+\[([\d,]+)\]", hlo)}


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_teacher_without_context_is_the_student_in_optimised_programs(tmp_path, remat):
    """The identity again in a process with the compiler's defaults, which fuse and round as a user's run does."""
    script = (
        "import dataclasses, sys, numpy as np, jax; from pathlib import Path; from tiny import run_config\n"
        "from opsa_jax import config as c; from opsa_jax.training.setup import prepare\n"
        f"base = run_config(Path({str(tmp_path)!r}), teacher=c.TeacherConfig(context_harmful='', context_benign=''))\n"
        f"run, state = prepare(dataclasses.replace(base, model=dataclasses.replace(base.model, remat={remat!r})))\n"
        "with jax.set_mesh(run.mesh):\n"
        "    _, batch = run.rollout(state, run.next_draws(), 0)\n"
        "    _, metrics = run.update(state, run.frozen, batch, np.int32(0))\n"
        "print(*(float(metrics[k][0]) for k in ('loss', 'kl_forward', 'kl_reverse', 'grad_norm')))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parent, env=environment)
    assert done.returncode == 0, done.stderr
    assert [float(x) for x in done.stdout.split()] == [0.0] * 4
