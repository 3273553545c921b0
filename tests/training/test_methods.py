"""The composition on a tiny model: routes, filters, given responses, policy gradients, preference pairs, steering, token sets."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny import make_model, run_config

from opsa_jax import config as c
from opsa_jax.errors import UserError
from opsa_jax.models.params import head_weight
from opsa_jax.models.transformer import forward, prompt_inputs
from opsa_jax.parallel import mesh
from opsa_jax.recipes import validate
from opsa_jax.rollout.filters import Sampling
from opsa_jax.rollout.sampler import row_keys, sample
from opsa_jax.training import setup
from opsa_jax.training.setup import prepare

NO_CONTEXT = c.TeacherConfig(context_harmful="", context_benign="")


def changed(kind, **values):
    return dataclasses.replace(kind, **values)


def write_rows(file, rows):
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return c.DataConfig(sources=(c.SourceConfig(path=str(file)),))


def prompts(n=16, **more):
    words = ["vault", "window", "door", "map"]
    fields = {name: value if callable(value) else (lambda i, value=value: value) for name, value in more.items()}
    return [
        {"id": f"r{i}", "prompt": f"help me open the {words[i % 4]} {'please ' * (i // 4)}", "label": ("harmful", "benign")[i % 2]}
        | {name: value(i) for name, value in fields.items()}
        for i in range(n)
    ]


def one_batch(config):
    validate(config)
    run, state = prepare(config)
    with jax.set_mesh(run.mesh):
        draws = run.next_draws()
        rollout, batch = run.rollout(state, draws, 0)
    return run, state, draws, rollout, batch


def updated(run, state, batch, u=0):
    with jax.set_mesh(run.mesh):
        state, metrics = run.update(state, run.frozen, batch, np.int32(u))
    return jax.device_get(state), {k: float(s) / max(float(w), 1e-9) for k, (s, w) in jax.device_get(metrics).items()}


def policy(**changes):
    return c.ObjectiveConfig(loss="policy", chunk=8, policy=c.PolicyConfig(**changes))


# --- several teachers ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_teachers(tmp_path):
    """A run whose records name teacher a or b in no regular order; b has a padded vocabulary."""
    paths = {"a": make_model(tmp_path / "a", seed=3), "b": make_model(tmp_path / "b", seed=4, vocab_extra=7)}
    data = write_rows(tmp_path / "routed.jsonl", prompts(teacher=lambda i: "ab"[(i * i // 3) % 2]))
    routes = tuple(f"{name}={path}" for name, path in paths.items())
    config = run_config(tmp_path, data=data, objective=policy(), teacher=changed(NO_CONTEXT, routes=routes), optim=c.OptimConfig(lr=0.0))
    return config, paths


def test_a_mixed_batch_scores_like_batches_of_one_teacher(two_teachers):
    config, paths = two_teachers
    run, _, draws, _, batch = one_batch(config)
    routes = np.array([run.prompts.route(e.record) for e, _ in draws])
    assert 0 < routes.sum() < len(routes)
    mixed = np.asarray(batch.scores.statistics["logp_teacher"])
    for k, path in enumerate(paths.values()):
        single = changed(config, teacher=changed(NO_CONTEXT, weights="checkpoint", path=str(path)))
        alone = np.asarray(one_batch(single)[4].scores.statistics["logp_teacher"])
        np.testing.assert_allclose(mixed[routes == k], alone[routes == k], atol=2e-5)
        assert np.abs(mixed[routes != k] - alone[routes != k]).max() > 1e-2


@pytest.mark.parametrize("micro", [8, 4])
def test_a_mixed_update_is_the_sum_of_its_teachers(two_teachers, micro):
    """Loss and gradient norm of the mixture against per-teacher losses on the rows of each."""
    config, paths = two_teachers
    config = changed(config, objective=c.ObjectiveConfig(chunk=8), train=changed(config.train, micro_batch=micro))
    run, state, draws, _, batch = one_batch(config)
    routes = np.array([run.prompts.route(e.record) for e, _ in draws])
    mask = np.asarray(batch.response_mask_SR)
    _, mixed = updated(run, state, batch)
    total = 0.0
    for k, path in enumerate(paths.values()):
        single = changed(config, teacher=changed(NO_CONTEXT, weights="checkpoint", path=str(path)))
        run_k, state_k, _, _, batch_k = one_batch(single)
        own = mask * (routes == k)[:, None]
        # The mask of other rows is emptied, so their tokens have no weight; the tokens before them stay what they are.
        _, alone = updated(run_k, state_k, batch_k.replace(response_mask_SR=jnp.asarray(own)))
        total += alone["loss"] * own.sum() / mask.sum()
    assert mixed["loss"] == pytest.approx(total, rel=1e-4)


def test_two_routes_to_one_checkpoint_are_one_teacher(tmp_path):
    path = make_model(tmp_path / "a", seed=3)
    data = write_rows(tmp_path / "routed.jsonl", prompts(teacher=lambda i: "ab"[i // 3 % 2]))
    one = changed(NO_CONTEXT, weights="checkpoint", path=str(path))
    two = changed(NO_CONTEXT, routes=(f"a={path}", f"b={path}"))
    results = []
    for teacher in (one, two):
        run, state, _, _, batch = one_batch(run_config(tmp_path, data=data, teacher=teacher, optim=c.OptimConfig(lr=1e-2, eps=1e-3)))
        results.append(updated(run, state, batch))
    assert results[0][1]["loss"] == pytest.approx(results[1][1]["loss"], rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), results[0][0].trainable, results[1][0].trainable)


def test_a_record_of_an_unknown_teacher_is_named(tmp_path, two_teachers):
    config, _ = two_teachers
    rows = prompts(teacher=lambda i: "a" if i != 5 else "c")
    with pytest.raises(UserError, match=r"record 'r5' .*line 6, names teacher 'c'; --teacher.routes has a, b"):
        prepare(changed(config, data=write_rows(tmp_path / "bad.jsonl", rows)))
    with pytest.raises(UserError, match=r"record 'r0' .* names no teacher"):
        prepare(changed(config, data=write_rows(tmp_path / "none.jsonl", prompts())))


def test_teachers_of_other_tokenizers_are_refused(tmp_path, two_teachers):
    config, paths = two_teachers
    file = paths["b"] / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    vocab["vault"], vocab["window"] = vocab["window"], vocab["vault"]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="needs one tokenizer"):
        prepare(config)


# --- weights and filters ------------------------------------------------------------------------------------------------------------


@pytest.mark.devices(8)
def test_scores_do_not_depend_on_micro_batches_or_devices(tmp_path, monkeypatch):
    objective = c.ObjectiveConfig(
        loss="policy", chunk=8, weights=c.WeightConfig("fire"), filter=c.FilterConfig("teacher_logp", 0.3), reduction="sequence_mean"
    )
    found = []
    for devices, micro in ((1, 8), (1, 2), (4, 4)):
        monkeypatch.setattr(setup, "make_mesh", functools.partial(mesh.make_mesh, devices=jax.devices()[:devices]))
        train = c.TrainConfig(steps=4, prompts_per_rollout=16, update_batch=8, micro_batch=micro)
        config = run_config(tmp_path, objective=objective, train=train, optim=c.OptimConfig(lr=1e-2, eps=1e-3))
        run, state, draws, _, batch = one_batch(config)
        names = [e.id for e, _ in draws]
        order = np.argsort(names)
        losses = []
        scores = jax.device_get(batch.scores)
        for u in (0, 1):
            state, metrics = updated(run, state, batch, u)
            losses.append(metrics["loss"])
        found.append((np.array(names)[order], scores.keep_S[order], scores.factors_SR[order], losses))
    names, keep, factors, losses = found[0]
    assert 0 < keep.sum() < len(keep) and factors.std() > 0
    for other in found[1:]:
        np.testing.assert_array_equal(other[0], names)
        np.testing.assert_array_equal(other[1], keep)
        np.testing.assert_allclose(other[2], factors, atol=1e-4)
        np.testing.assert_allclose(other[3], losses, rtol=1e-3, atol=1e-5)


def test_dropped_responses_do_not_matter(tmp_path):
    """What a filtered response holds does not reach the loss."""
    objective = c.ObjectiveConfig(chunk=8, filter=c.FilterConfig("teacher_logp", 0.5))
    run, state, _, _, batch = one_batch(run_config(tmp_path, objective=objective, optim=c.OptimConfig(lr=0.0)))
    dropped = np.asarray(batch.scores.keep_S) == 0
    assert dropped.any()
    other = jnp.where(dropped[:, None], 5, batch.response_SR)
    state, first = updated(run, state, batch)
    _, second = updated(run, jax.device_put(state), batch.replace(response_SR=other))
    assert first["loss"] == second["loss"] > 0


# --- policy gradients ---------------------------------------------------------------------------------------------------------------


def test_first_policy_update_is_minus_the_weighted_advantage(tmp_path):
    run, state, _, _, batch = one_batch(run_config(tmp_path, objective=policy(advantage="teacher")))
    mask, s = np.asarray(batch.response_mask_SR), jax.device_get(batch.scores)
    expected = -(mask * (s.statistics["logp_teacher"] - s.statistics["logp_student"])).sum() / mask.sum()
    _, metrics = updated(run, state, batch)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-4)
    assert metrics["clipped"] == 0


def test_sampled_log_probabilities_are_those_of_the_rollout(tmp_path):
    _, _, _, rollout, batch = one_batch(run_config(tmp_path, objective=policy()))
    np.testing.assert_allclose(batch.scores.statistics["logp_student"], rollout.logp_BR, atol=1e-4)


@pytest.mark.parametrize("advantage", ["return", "token", "outcome"])
def test_advantages_of_a_prompt_are_normalised_together(tmp_path, advantage):
    room = c.RolloutConfig(max_new_tokens=6, samples_per_prompt=4)
    train = c.TrainConfig(steps=2, prompts_per_rollout=4, update_batch=8, micro_batch=4)
    config = run_config(tmp_path, objective=policy(advantage=advantage), rollout=room, train=train)
    run, state, draws, _, batch = one_batch(config)
    groups, mask = np.asarray(batch.group_S), np.asarray(batch.response_mask_SR)
    a = np.asarray(batch.scores.advantage_SR)
    for e, _ in draws:
        rows = [i for i, (other, _) in enumerate(draws) if other is e]
        assert len(rows) == 4 and len(set(groups[rows])) == 1
        if advantage == "token":
            inside = a[rows][mask[rows] > 0]
            assert inside.mean() == pytest.approx(0, abs=1e-4) and inside.std() == pytest.approx(1, abs=1e-2)
    assert len(set(groups)) == 4
    assert np.isfinite(updated(run, state, batch)[1]["loss"])
    if advantage == "outcome":
        assert set(np.asarray(batch.outcome_S)) <= {-1.0, 1.0}


def test_own_reward_function(tmp_path):
    file = tmp_path / "reward.py"
    file.write_text("def short(record, response):\n    return -float(len(response.split()))\n")
    room, train = c.RolloutConfig(max_new_tokens=6, samples_per_prompt=2), c.TrainConfig(steps=1, prompts_per_rollout=4, update_batch=8)
    objective = policy(advantage="outcome", reward=f"{file}:short")
    config = run_config(tmp_path, objective=objective, rollout=room, train=train)
    run, _, _, rollout, batch = one_batch(config)
    assert np.asarray(batch.outcome_S).tolist() == [-float(len(text.split())) for text in run.texts(rollout)]
    for wrong in ("nonsense", f"{file}:long"):
        with pytest.raises(UserError, match=r"objective.policy.reward"):
            prepare(changed(config, objective=policy(advantage="outcome", reward=wrong)))


def test_reference_kl_and_exopd_use_the_initial_student(tmp_path):
    for objective in (policy(reference_kl=0.1), policy(advantage="exopd")):
        run, _, _, _, batch = one_batch(run_config(tmp_path, objective=objective))
        s = batch.scores.statistics
        np.testing.assert_allclose(s["logp_reference"], s["logp_student"], atol=1e-5)
        assert run.frozen.reference is run.frozen.teachers[0], "one copy serves as teacher and reference"


# --- given responses ----------------------------------------------------------------------------------------------------------------


def logp_by_hand(run, params, prompt, answer):
    """Sum of log-probabilities of an answer, from materialised float64 logits."""
    tokens = np.concatenate([prompt, answer])[None]
    positions, segments = prompt_inputs(jnp.ones_like(jnp.asarray(tokens)))
    hidden = forward(params, run.student.cfg, jnp.asarray(tokens), positions, segments).hidden_BTD[0]
    logits = np.asarray(hidden, np.float64) @ np.asarray(head_weight(params), np.float64)
    logp = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1, keepdims=True)
    at = np.arange(len(prompt) - 1, tokens.shape[1] - 1)
    return logp[at, tokens[0, at + 1]].sum()


def file_run(tmp_path, rows, **changes):
    room = c.RolloutConfig(writer="file", max_new_tokens=10)
    defaults = {"data": write_rows(tmp_path / "answers.jsonl", rows), "rollout": room, "objective": c.ObjectiveConfig(loss="nll", chunk=8)}
    return run_config(tmp_path, **(defaults | changes))


def test_sft_is_the_mean_negative_log_likelihood(tmp_path):
    rows = prompts(response=lambda i: "i cannot help you" if i % 2 == 0 else "here is how you open the door")
    run, state, draws, rollout, batch = one_batch(file_run(tmp_path, rows))
    assert run.frozen.teachers == () and run.score is None, "SFT loads no teacher"
    assert [e.record.response for e, _ in draws] == run.texts(rollout)
    totals = [logp_by_hand(run, state.trainable, e.prompt_ids, e.answers[0]) for e, _ in draws]
    tokens = sum(len(e.answers[0]) for e, _ in draws)
    assert all(e.answers[0][-1] in run.chat.stop_ids for e, _ in draws)
    state, metrics = updated(run, state, batch)
    assert metrics["loss"] == pytest.approx(-sum(totals) / tokens, rel=1e-4)
    for _ in range(5):
        state, metrics = updated(run, jax.device_put(state), batch)
    assert metrics["loss"] < -sum(totals) / tokens


def test_dpo_begins_at_log_two_and_widens_the_margin(tmp_path):
    rows = prompts(response="i cannot help you", rejected="here is how you open the door map")
    room = c.RolloutConfig(writer="file", max_new_tokens=10, samples_per_prompt=2)
    objective = c.ObjectiveConfig(loss="dpo", dpo_beta=0.5, chunk=8)
    train = c.TrainConfig(steps=6, prompts_per_rollout=8, update_batch=16, micro_batch=4)
    config = file_run(tmp_path, rows, rollout=room, objective=objective, train=train)
    run, state, draws, rollout, batch = one_batch(config)
    texts = run.texts(rollout)
    assert all(text == (e.record.rejected if i else e.record.response) for (e, i), text in zip(draws, texts, strict=True))
    reference = np.asarray((batch.scores.statistics["logp_reference"] * batch.response_mask_SR).sum(-1))
    by_hand = [logp_by_hand(run, state.trainable, e.prompt_ids, e.answers[i]) for e, i in draws]
    np.testing.assert_allclose(reference, by_hand, rtol=1e-4)
    state, first = updated(run, state, batch)
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-4) and first["margin"] == pytest.approx(0, abs=1e-3)
    for _ in range(5):
        state, last = updated(run, jax.device_put(state), batch)
    assert last["margin"] > 0.1 and last["chosen_wins"] == 1 and last["loss"] < first["loss"]


def test_dpo_does_not_depend_on_micro_batches(tmp_path):
    rows = prompts(response=lambda i: "i cannot " * (1 + i % 3), rejected=lambda i: "here is how " * (1 + i % 2))
    room = c.RolloutConfig(writer="file", max_new_tokens=10, samples_per_prompt=2)
    results = []
    for micro in (16, 2):
        train = c.TrainConfig(steps=6, prompts_per_rollout=8, update_batch=16, micro_batch=micro)
        objective = c.ObjectiveConfig(loss="dpo", chunk=8)
        optim = c.OptimConfig(lr=1e-2, eps=1e-3)
        run, state, _, _, batch = one_batch(file_run(tmp_path, rows, rollout=room, objective=objective, train=train, optim=optim))
        results.append(updated(run, state, batch))
    assert results[0][1]["loss"] == pytest.approx(results[1][1]["loss"], rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), results[0][0].trainable, results[1][0].trainable)


def test_the_teacher_writes_with_its_context(tmp_path):
    config = run_config(tmp_path)
    config = changed(config, rollout=changed(config.rollout, writer="teacher"))
    run, _, draws, rollout, batch = one_batch(config)
    with jax.set_mesh(run.mesh):
        ids = np.array([e.key for e, _ in draws], np.int32)
        keys = row_keys(jax.random.key(config.seed), "rollout", 0, ids, np.zeros(len(ids), np.int32))
        prompt = batch.teacher_prompt_SQ, batch.teacher_mask_SQ
        expected = sample(run.frozen.teachers[0], run.student.cfg, Sampling(), run.chat.stop_ids, 6, *prompt, keys)
    np.testing.assert_array_equal(
        np.asarray(rollout.response_ids_BR) * np.asarray(rollout.response_mask_BR),
        np.asarray(expected.response_ids_BR) * np.asarray(expected.response_mask_BR),
    )


# --- steering and token sets --------------------------------------------------------------------------------------------------------


def steered(tmp_path, coefficient, **objective):
    direction = np.zeros((2, 16), np.float32)
    direction[1] = np.random.default_rng(0).normal(size=16)
    save_file({"steer": direction}, str(tmp_path / "direction.safetensors"))
    teacher = changed(NO_CONTEXT, steering=str(tmp_path / "direction.safetensors"), steering_coefficient=coefficient)
    return run_config(tmp_path, teacher=teacher, objective=c.ObjectiveConfig(chunk=8, **objective))


def test_a_steered_teacher_differs_and_coefficient_zero_is_the_student_bit_for_bit(tmp_path):
    run, state, _, _, batch = one_batch(steered(tmp_path, 2.0))
    assert updated(run, state, batch)[1]["loss"] > 1e-3
    run, state, _, _, batch = one_batch(steered(tmp_path, 0.0))
    _, metrics = updated(run, state, batch)
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0


def test_a_token_set_is_the_support(tmp_path):
    """Every token in the set makes it the whole vocabulary; a few make it less."""
    make_model(tmp_path / "model")
    vocabulary = json.loads((tmp_path / "model/config.json").read_text())["vocab_size"]
    losses = {}
    for name, ids in (("all", range(vocabulary)), ("some", (7, 9, 12))):
        content = {"tokens": [{"id": i, "text": str(i), "votes": 1, "mean_delta": 0.0} for i in ids], "vocab_size": vocabulary}
        (tmp_path / f"{name}.json").write_text(json.dumps(content | {"mode": "direction"}))
        config = steered(tmp_path, 2.0, divergence="reverse", support="tokens", subset="generalised", tokens=str(tmp_path / f"{name}.json"))
        run, state, _, _, batch = one_batch(config)
        assert run.place()["frozen"]["tokens"]["count"] == len(ids) and run.place()["frozen"]["steering"]["hash"]
        losses[name] = updated(run, state, batch)[1]["loss"]
    run, state, _, _, batch = one_batch(steered(tmp_path, 2.0, divergence="reverse"))
    assert losses["all"] == pytest.approx(updated(run, state, batch)[1]["loss"], rel=1e-4)
    assert 0 < losses["some"] < losses["all"]


def test_a_constitution_by_category(tmp_path):
    file = tmp_path / "constitution.json"
    file.write_text(json.dumps({"default": "", "general": "you can", "categories": {"locks": "you cannot help", "doors": "i will not"}}))
    data = write_rows(tmp_path / "rows.jsonl", prompts(category=lambda i: ("locks", "doors")[i // 2 % 2]))
    teacher = changed(NO_CONTEXT, constitution=f"file:{file}")
    config = run_config(tmp_path, data=data, teacher=teacher)
    run, *_ = one_batch(config)
    for e in (e for source in run.prompts.checked.sources for e in source):
        words = {"harmful": {"locks": "cannot", "doors": "not"}[e.record.category], "benign": "can"}[e.record.label]
        assert run.chat.tokenizer.convert_tokens_to_ids(words) in e.teacher_ids
        assert run.chat.tokenizer.convert_tokens_to_ids(words) not in e.prompt_ids
    bad = write_rows(tmp_path / "bad.jsonl", prompts(category="keys"))
    with pytest.raises(UserError, match="constitution without the needed category"):
        prepare(changed(config, data=bad))


# --- bad input ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": policy(advantage="return")}, "--rollout.samples-per-prompt 1: .*at least 2"),
        ({"objective": policy(), "rollout": c.RolloutConfig(writer="teacher")}, "--rollout.writer teacher"),
        ({"objective": c.ObjectiveConfig(support="tokens")}, "--objective.tokens"),
        ({"objective": c.ObjectiveConfig(loss="dpo")}, "--rollout.writer student: loss=dpo"),
        ({"rollout": c.RolloutConfig(writer="file", samples_per_prompt=2)}, "one response"),
        ({"teacher": c.TeacherConfig(routes=("math",))}, "NAME=CHECKPOINT"),
        ({"teacher": c.TeacherConfig(routes=("a=x", "a=y"))}, "names must differ"),
        ({"objective": c.ObjectiveConfig(weights=c.WeightConfig("tip", keep=0.0))}, "--objective.weights.keep 0.0"),
    ],
)
def test_methods_are_checked_before_anything_is_loaded(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        validate(run_config(tmp_path, **changes))


def test_missing_and_long_answers_are_named(tmp_path):
    with pytest.raises(UserError, match=r"record 'r3' .*line 4, has no response"):
        prepare(file_run(tmp_path, prompts(response=lambda i: "" if i == 3 else "i cannot")))
    rows = prompts(response=lambda i: "i cannot " * (9 if i == 2 else 1))
    with pytest.raises(UserError, match=r"record 'r2' .* has 19 tokens, more than --rollout.max-new-tokens 10"):
        prepare(file_run(tmp_path, rows))
    config = file_run(tmp_path, rows)
    run, _ = prepare(changed(config, data=changed(config.data, long_prompts="skip")))
    assert sum(map(len, run.prompts.checked.sources)) == 15


def test_missing_artifacts_are_one_line(tmp_path):
    for teacher, objective in (
        (changed(NO_CONTEXT, steering=str(tmp_path / "none.safetensors")), c.ObjectiveConfig()),
        (NO_CONTEXT, c.ObjectiveConfig(support="tokens", tokens=str(tmp_path / "none.json"))),
        (changed(NO_CONTEXT, constitution=f"file:{tmp_path / 'none.json'}"), c.ObjectiveConfig()),
    ):
        with pytest.raises(UserError, match="none"):
            prepare(run_config(tmp_path, teacher=teacher, objective=objective))
