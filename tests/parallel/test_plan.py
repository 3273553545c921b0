"""Plans: abstract arrays are those of a real run, collectives and FLOPs are counted right, presets are the published models."""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from opsa_jax import config as c
from opsa_jax import plan
from opsa_jax.errors import UserError
from opsa_jax.models.config import DecoderConfig, to_hf
from opsa_jax.models.params import abstract_params
from opsa_jax.models.transformer import forward, prompt_inputs
from opsa_jax.parallel.mesh import make_mesh
from opsa_jax.parallel.topology import get_topology
from opsa_jax.planning import costs
from opsa_jax.planning.arrays import abstract_batch, abstract_run, device_bytes
from opsa_jax.planning.hlo import collectives
from opsa_jax.planning.planner import make_plan
from opsa_jax.planning.presets import PRESETS, preset
from opsa_jax.planning.programs import compile_program

sys.path.append(str(Path(__file__).parents[1] / "training"))
from tiny import run_config

PUBLISHED = {
    "qwen3-8b": 8_190_735_360, "qwen3-4b": 4_022_468_096, "r1-distill-qwen-1.5b": 1_777_088_000, "qwen2.5-7b": 7_615_616_512,
    "qwen3-30b-a3b": 30_532_122_624, "llama-3-8b": 8_030_261_248, "r1-distill-llama-8b": 8_030_261_248, "llama-3.2-3b": 3_212_749_824,
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_number_of_weights(name):
    """Counted by transformers in the model that our config.json describes; and the numbers on the models' pages."""
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    cfg = preset(name)
    fields = to_hf(cfg)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    assert sum(p.numel() for p in model.parameters()) == cfg.n_params == PUBLISHED.get(name, cfg.n_params)
    assert all(preset(hub.upper()) == cfg for hub in PRESETS[name][0])


RUNS = {
    "full": {},
    "lora": {"model": c.ModelConfig(lora=c.LoraConfig(rank=2))},
    "ema": {"teacher": c.TeacherConfig(weights="ema", context_harmful="you cannot", context_benign="")},
    "scored": {"objective": c.ObjectiveConfig(chunk=8, weights=c.WeightConfig(kind="entropy"))},
}


@pytest.mark.parametrize("kind", RUNS)
def test_abstract_arrays_are_those_of_a_run(tmp_path, kind):
    """Shape, dtype and sharding of every array that a real run puts on the devices, on a 2 x 2 x 2 mesh."""
    from opsa_jax.planning.programs import with_scores
    from opsa_jax.training.setup import prepare

    changes = dict(RUNS[kind])
    if "model" in changes:
        changes["model"] = dataclasses.replace(changes["model"], path=run_config(tmp_path).model.path)
    config = run_config(tmp_path, mesh=c.MeshConfig(2, 2, 2), **changes)
    run, state = prepare(config)
    with jax.set_mesh(run.mesh):
        rollout, batch = run.rollout(state, run.next_draws(), 0)
    mine = abstract_run(config, run.student.cfg, (), run.mesh, run.total_updates)[:2]
    checked = run.prompts.checked
    rooms = checked.prompt_width, checked.teacher_width, config.rollout.max_new_tokens
    mine_batch = abstract_batch(run.mesh, rollout.response_ids_BR.shape[0], *rooms)
    if run.score:
        with jax.set_mesh(run.mesh):
            mine_batch = with_scores(mine_batch, run.score, *mine, run.mesh)

    def same(real, abstract):
        assert (real.shape, real.dtype) == (abstract.shape, abstract.dtype)
        assert real.sharding.shard_shape(real.shape) == abstract.sharding.shard_shape(abstract.shape)

    jax.tree.map(same, (state, run.frozen), mine)
    jax.tree.map(lambda real, abstract: same(real, abstract), dataclasses.replace(batch, scores=None), mine_batch.replace(scores=None))
    if run.score:
        jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype) or pytest.fail(f"{x} {y}"), batch.scores, mine_batch.scores)


def test_state_per_device_falls_with_fsdp():
    """Qwen3-0.6B: parameters and optimizer take 1 / fsdp of the memory (only the norm scales of heads are whole), tensor adds its share."""
    config, cfg = c.RunConfig(), preset("qwen3-0.6b")
    sizes = {}
    for shape in ((1, 1, 1), (1, 2, 1), (1, 8, 1), (1, 4, 2), (8, 1, 1)):
        mesh = make_mesh(c.MeshConfig(*shape), jax.devices()[: shape[0] * shape[1] * shape[2]])
        state, _, _ = abstract_run(config, cfg, (), mesh, 10)
        sizes[shape] = device_bytes((state.trainable, state.opt_state))
    whole = sizes[1, 1, 1]
    assert whole == 3 * 4 * cfg.n_params + 8  # two int32 counters
    assert sizes[8, 1, 1] == whole
    for shape in ((1, 2, 1), (1, 8, 1), (1, 4, 2)):
        assert whole <= sizes[shape] * shape[1] * shape[2] < 1.001 * whole


def test_collectives_are_counted_with_their_loops():
    """Three loops with known trips, one inside another, and a loop that may end early."""
    mesh = make_mesh(c.MeshConfig(1, 8, 1))
    reduce = functools.partial(jax.lax.psum, axis_name="fsdp")

    def local(x):
        def inner(_, y):
            return reduce(y) * 0.5

        x = jax.lax.fori_loop(0, 5, lambda i, y: jax.lax.fori_loop(0, 3, inner, jnp.tanh(y)), x)
        x, _ = jax.lax.while_loop(lambda s: (s[1] < 7) & (s[0].sum() < 1e9), lambda s: (reduce(s[0]) + 1, s[1] + 1), (x, 0))
        n = x.astype(jnp.int32)[0]
        return jax.lax.fori_loop(0, n, lambda i, y: reduce(y) + i, x)

    program = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"), check_vma=False))
    text = program.lower(jax.ShapeDtypeStruct((8 * 256,), jnp.float32)).compile().as_text()
    found = [x for x in collectives(text, unknown_trips=11) if x.bytes == 1024]
    assert {x.kind for x in found} == {"all-reduce"} and {x.group for x in found} == {8}
    assert sorted(x.runs for x in found) == [7, 11, 15]
    assert found[0].wire_bytes == 2 * 7 / 8 * 1024


TPU_TEXT = """
HloModule jit_f

%fused_step (p: bf16[16,128]) -> bf16[128,128] {
  %p = bf16[16,128]{1,0:T(8,128)} parameter(0)
  ROOT %all-gather.2 = bf16[128,128]{1,0} all-gather(%p), channel_id=7, GROUPS, dimensions={0}
}

%cond (s: (s32[], bf16[16,128])) -> pred[] {
  %constant.5 = s32[]{:T(128)} constant(28)
  %s = (s32[]{:T(128)}, bf16[16,128]{1,0}) parameter(0)
  %get-tuple-element.1 = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %lt = pred[]{:T(512)} compare(%get-tuple-element.1, %constant.5), direction=LT
}

%body (s: (s32[], bf16[16,128])) -> (s32[], bf16[16,128]) {
  %s = (s32[]{:T(128)}, bf16[16,128]{1,0}) parameter(0)
  %w = bf16[16,128]{1,0} get-tuple-element(%s), index=1
  %fusion.1 = bf16[128,128]{1,0} fusion(%w), kind=kCustom, calls=%fused_step
  %all-gather.3 = bf16[128,128]{1,0} all-gather(%w), channel_id=7, GROUPS, dimensions={0}
  %permute-start = (bf16[16,128]{1,0}, bf16[16,128]{1,0}, u32[]{:S(2)}) collective-permute-start(%w), channel_id=9, pairs={{0,1}}
  %reduce-scatter.4 = f32[2,128]{1,0} reduce-scatter(%w), channel_id=11, replica_groups=[2,8]<=[16], to_apply=%add
  ROOT %tuple = (s32[], bf16[16,128]{1,0}) tuple(%s, %w)
}

ENTRY %main (a: bf16[16,128]) -> bf16[16,128] {
  %a = bf16[16,128]{1,0} parameter(0)
  %while.1 = (s32[], bf16[16,128]{1,0}) while(%a), condition=%cond, body=%body, metadata={op_name="jit(f)/while"}
  ROOT %out = bf16[16,128]{1,0} get-tuple-element(%while.1), index=1
}
"""


def test_text_of_tpu_programs():
    """A collective spread over fusions counts once; trip counts come from the condition; sizes of async and scattering operations."""
    groups = "replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_0'}, attributes={chain_id=3}"
    found = {x.kind: x for x in collectives(TPU_TEXT.replace("GROUPS", groups))}
    assert {k: (x.bytes, x.group, x.runs) for k, x in found.items()} == {
        "all-gather": (128 * 128 * 2, 8, 28), "collective-permute": (16 * 128 * 2, 2, 28), "reduce-scatter": (8 * 2 * 128 * 4, 8, 28),
    }  # fmt: skip
    assert found["all-gather"].loops == ("jit(f)/while",)


def test_flops_are_those_of_the_compiled_matrix_products():
    """One layer, which the compiler counts fully; its attention computes all pairs, ours those that are seen."""
    cfg = DecoderConfig("qwen3", 64, 128, 1, 8, 2, 16, 256, qk_norm=True, tie_embeddings=True)
    B, T = 2, 64

    def run(params, tokens):
        return forward(params, cfg, tokens, *prompt_inputs(jnp.ones((B, T), jnp.int32))).hidden_BTD

    counted = jax.jit(run).lower(abstract_params(cfg), jax.ShapeDtypeStruct((B, T), jnp.int32)).compile().cost_analysis()["flops"]
    unseen = 4 * cfg.n_heads * cfg.head_dim * (T * T - T * (T + 1) / 2)
    ours = B * (costs.forward_flops(cfg, T) + unseen)
    assert ours < counted < 1.1 * ours  # the rest: norms, softmax, rotation
    parts = costs.forward_flops(cfg, 40) + costs.forward_flops(cfg, 24, 40)
    assert parts == costs.forward_flops(cfg, T), "prefill and decoding see the same pairs"
    local = dataclasses.replace(cfg, windows=(16,))
    assert costs.forward_flops(local, T) < costs.forward_flops(cfg, T)
    experts = dataclasses.replace(cfg, n_experts=64, experts_per_token=4, d_ff=64)
    router = 2 * cfg.d_model * 64 * T
    assert costs.forward_flops(experts, T) == costs.forward_flops(cfg, T) + router, "four experts of a quarter of the width each"
    assert costs.block_weights(experts) == costs.block_weights(cfg) + cfg.d_model * (64 + 3 * 60 * 64)


def test_program_too_large_is_a_result():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for the program, its arguments and outputs (31.11G) "
        "exceeds available HBM (15.75G)"
    )

    class TooLarge:
        def lower(self, *args):
            raise jax.errors.JaxRuntimeError(message)

    found = compile_program("update", TooLarge(), (), make_mesh(c.MeshConfig()))
    assert not found.fits and (found.peak, found.limit) == (int(31.11 * 2**30), int(15.75 * 2**30))


def test_plan_of_a_tiny_run(tmp_path, capsys):
    """From config.json alone; one JSON object. The head's collectives stay outside the chunk loop, and its gradient is summed in float32;
    weights are gathered in the layer scan of training and once for all tokens of decoding."""
    cfg = DecoderConfig("qwen3", 2048, 16, 2, 4, 2, 8, 32, qk_norm=True)
    (tmp_path / "config.json").write_text(json.dumps(to_hf(cfg)))
    run = [
        *("--model.path", str(tmp_path), "--data.max-prompt-tokens", "16", "--data.max-teacher-prompt-tokens", "24"),
        *("--rollout.max-new-tokens", "16", "--objective.chunk", "8", "--mesh.fsdp", "4", "--mesh.tensor", "2"),
    ]
    assert plan.main(["--topology", "cpu:8", "--json", *run]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"fits", "hbm_peak_bytes", "hbm_limit_bytes", "compile_seconds", "collectives", "flops"} <= set(found)
    assert found["fits"] and found["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2} and found["parameters"] == cfg.n_params
    assert set(found["programs"]) == set(found["flops"]) == {"rollout", "update"}
    config = c.RunConfig(
        model=c.ModelConfig(path=str(tmp_path)), data=c.DataConfig(max_prompt_tokens=16, max_teacher_prompt_tokens=24),
        rollout=c.RolloutConfig(max_new_tokens=16), objective=c.ObjectiveConfig(chunk=8), mesh=c.MeshConfig(1, 4, 2),
    )  # fmt: skip
    programs = make_plan(config, get_topology("cpu:8")).programs
    check_head(programs["update"].collectives, 16 * 2048 // 2)
    in_blocks = [x for x in programs["update"].collectives if x.kind == "all-gather" and x.bytes >= 4 * 16 * 32 // 2 and x.loops]
    assert in_blocks, "weights are gathered inside the layer scan"
    decoding = [x for x in programs["rollout"].collectives if any("decode" in loop for loop in x.loops)]
    assert decoding and max(x.bytes for x in decoding) < 16 * 32 * 4 // 2, "decoding gathers no weights"


def check_head(found, head: int):
    """No collective inside a chunk loop moves as much as a head, and its gradient's reduction is in float32."""
    inside = [x for x in found if any("loss" in loop for loop in x.loops)]
    assert inside, "the loop over chunks is found"
    assert max(x.bytes for x in inside) < head
    reduced = [x for x in found if x.kind in ("all-reduce", "reduce-scatter") and x.bytes >= 4 * head and x not in inside]
    assert reduced and {x.dtype for x in reduced} == {"f32"}


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--topology", "v5e:16x61"], "did you mean '16x16'"),
        (["--topology", "v4:2x2"], "did you mean"),
        (["--topology", "v5p:3x4x4"], "no slice"),
        ([], "--topology is missing"),
        (["--topology", "cpu:8"], "--data.max-prompt-tokens"),
        (["--topology", "cpu:8", "--search-limit", "0"], "at least 1"),
        (["--topology", "cpu:8", "--mesh.data", "3"], "nearest that does"),
        (["--topology", "cpu:8", "--mesh.tensor", "8"], "heads=4 over tensor=8"),
        (["--topology", "cpu:8", "--train.micro-batch", "4"], "does not divide over 8 shards"),
        (["--topology", "cpu:8", "--model.path", "qwen3-8"], "did you mean 'qwen3-8b'"),
        (["--topology", "cpu:4000"], "CPU devices"),
    ],
)
def test_bad_input(argv, says):
    if len(argv) > 2 and argv[2] != "--search-limit":
        argv = [*argv, "--data.max-prompt-tokens", "16", "--data.max-teacher-prompt-tokens", "24"]
    with pytest.raises(UserError, match=says):
        plan.main(argv)


def test_without_libtpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(UserError, match="pip install 'opsa_jax"):
        get_topology("v5e:2x4")


def in_process(argv: list[str], code: int = 0) -> str:
    """stdout of a process of its own: libtpu is loaded once per process, and the compiler has its defaults."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert done.returncode == code, done.stderr[-2000:]
    return done.stdout


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra: tpu)")


@pytest.mark.slow
@needs_libtpu
def test_pod_topology():
    """Qwen3-0.6B, full fine-tuning of OPSA, compiled by TPU's own compiler for a v5e:2x4 slice."""
    argv = ["-m", "opsa_jax.plan", "configs/opsa/qwen3_0p6b.py", "--topology", "v5e:2x4", "--programs", "update", "--json"]
    found = json.loads(in_process(argv).splitlines()[-1])
    assert found["fits"] and found["parameters"] == 596_049_920 and found["devices"] == 8
    assert 1 * 2**30 < found["hbm_peak_bytes"] < found["hbm_limit_bytes"] == int(15.75 * 2**30)
    assert found["collectives"]["update"]["all-gather"]["runs"] > 28


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("experts", [{}, {"family": "qwen3_moe", "n_experts": 8, "experts_per_token": 2}], ids=["dense", "experts"])
def test_small_tpu_programs(tmp_path, experts):
    """On a v5e:2x2 slice: splash is in the program, the head's collectives stay outside the chunk loop and are summed in float32."""
    cfg = dataclasses.replace(DecoderConfig("qwen3", 8192, 256, 2, 4, 2, 128, 512, qk_norm=True), **experts)
    (tmp_path / "config.json").write_text(json.dumps(to_hf(cfg)))
    script = (
        "import sys; sys.path.insert(0, 'tests/parallel')\n"
        "from opsa_jax.parallel.topology import get_topology\ntopology = get_topology('v5e:2x2')\n"
        "from opsa_jax import config as c; from opsa_jax.planning.planner import make_plan; from test_plan import check_head\n"
        f"config = c.RunConfig(model=c.ModelConfig(path={str(tmp_path)!r}, remat='full'), mesh=c.MeshConfig(1, 2, 2),\n"
        "    data=c.DataConfig(max_prompt_tokens=128, max_teacher_prompt_tokens=256), objective=c.ObjectiveConfig(chunk=128),\n"
        "    rollout=c.RolloutConfig(max_new_tokens=256), train=c.TrainConfig(prompts_per_rollout=8, update_batch=8, micro_batch=4))\n"
        "plan = make_plan(config, topology, ('update',), keep_text=True)\n"
        "check_head(plan.programs['update'].collectives, 256 * 8192 // 2)\n"
        "from opsa_jax.parallel.mesh import make_mesh  # sizes that no product of the slice's axes has\n"
        "assert make_mesh(c.MeshConfig(2, 32, 1), get_topology('v6e:8x8').devices).size == 64\n"
        "print('splash' in plan.programs['update'].text, plan.fits)\n"
    )
    assert in_process(["-c", script]).split() == ["True", "True"]


@pytest.mark.slow
@needs_libtpu
def test_too_large_for_a_slice():
    """Qwen3-8B on four chips: the compiler says no within seconds, by how much, and the exit code says so."""
    argv = ["-m", "opsa_jax.plan", "configs/opsa/qwen3_8b.py", "--topology", "v5e:2x2", "--programs", "update", "--json"]
    found = json.loads(in_process(argv, code=1).splitlines()[-1])
    assert not found["fits"] and found["hbm_peak_bytes"] > found["hbm_limit_bytes"] == int(15.75 * 2**30)


def test_search_orders_candidates_without_compiling():
    """8B on a small mesh: what does not fit by its weights alone is left out; every candidate divides."""
    from opsa_jax.planning.search import candidates, promising

    topology = dataclasses.replace(get_topology("cpu:8"), chip=dataclasses.replace(get_topology("cpu:8").chip, hbm_bytes=16 * 2**30))
    config = dataclasses.replace(
        c.RunConfig(), model=c.ModelConfig(path="qwen3-0.6b", compute_dtype="bfloat16"),
        data=c.DataConfig(max_prompt_tokens=1024, max_teacher_prompt_tokens=1280),
        rollout=c.RolloutConfig(max_new_tokens=3072), train=c.TrainConfig(prompts_per_rollout=64, update_batch=64),
    )  # fmt: skip
    found = promising(config, topology)
    assert 0 < len(found) < len(list(candidates(config, 8)))
    assert all(x.mesh.data * x.mesh.fsdp * x.mesh.tensor == 8 for x in found)
    assert not any(x.model.remat == "none" and x.train.micro_batch == 64 for x in found), "what the backward pass needs is too large"


def test_search_ranks_what_fits(monkeypatch):
    """What does not fit goes on until enough fit; the ranking is by time, with what does not fit last."""
    from opsa_jax.planning import search

    class Fake:
        def __init__(self, number):
            self.fits, self.serial_seconds, self.peak = number in (1, 3), 10.0 - number, 1

    numbers = iter(range(8))
    monkeypatch.setattr(search, "promising", lambda config, topology: [c.RunConfig(mesh=c.MeshConfig(fsdp=n)) for n in range(8)])
    monkeypatch.setattr(search, "make_plan", lambda candidate, topology, say: Fake(next(numbers)))
    found = search.search(c.RunConfig(), get_topology("cpu:8"), 2, lambda line: None)
    assert [p.serial_seconds for p in found] == [7.0, 9.0, 8.0, 10.0]
    monkeypatch.setattr(search, "promising", lambda config, topology: [])
    with pytest.raises(UserError, match="larger topology"):
        search.search(c.RunConfig(), get_topology("cpu:8"), 2, lambda line: None)
