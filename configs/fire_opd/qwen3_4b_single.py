"""FiRe-OPD (arXiv 2606.02684) on Qwen3-4B without thinking: one specialised teacher of the same size (RL on mathematics).

Command:  python -m opsa_jax.train configs/fire_opd/qwen3_4b_single.py
Data:     data/deepmath.jsonl with id and prompt: DeepMath problems of level 6 and above (the labels are not used: --data.sources.0.label
          benign is set in the recipe).
Devices:  sixteen 80 GB GPUs, or a v5p:2x2x4 slice; responses are up to 16,384 tokens
Expected: better than token-level rivals at equal steps, as reported by the paper; not reproduced here: no such machine was available.
Variants: --objective.loss divergence --objective.divergence reverse is the exact form (lower variance, the same expected gradient when
          only reweighting); --objective.filter.kind none is what the published code does (its quantile is taken in micro-batches of
          one, which keeps everything); --objective.reduction token_mean; --train.update-batch 256 makes four clipped updates a rollout.
"""

from opsa_jax import config as c


def get_config() -> c.RunConfig:
    return c.RunConfig(
        out="runs/fire-qwen3_4b_single",
        model=c.ModelConfig(path="Qwen/Qwen3-4B", thinking="off", remat="full"),
        teacher=c.TeacherConfig(weights="checkpoint", path="checkpoints/qwen3-4b-rl-math", context_harmful="", context_benign=""),
        data=c.DataConfig(
            sources=(c.SourceConfig(path="data/deepmath.jsonl", label="benign"),),
            max_prompt_tokens=2048,
            max_teacher_prompt_tokens=2048,
            long_prompts="skip",
        ),
        rollout=c.RolloutConfig(temperature=1.0, max_new_tokens=16384, micro_batch=256),
        objective=c.ObjectiveConfig(
            loss="policy",
            reduction="sequence_mean",
            weights=c.WeightConfig(kind="fire", teacher_confidence=1.0, student_entropy=1.0),
            filter=c.FilterConfig(kind="teacher_logp", quantile=0.2),
            policy=c.PolicyConfig(advantage="teacher", clip=0.2),
            chunk=256,
        ),
        optim=c.OptimConfig(lr=1e-6, schedule="constant", warmup=0.0, weight_decay=0.01, clip_norm=1.0),
        train=c.TrainConfig(steps=0, epochs=3, prompts_per_rollout=1024, update_batch=1024, micro_batch=64, save_every=10),
        evals=c.EvalConfig(suite="", refusal_phrases="english-v1"),
    )
