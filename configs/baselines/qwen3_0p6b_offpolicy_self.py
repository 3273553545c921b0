r"""Off-policy self-distillation (ThinkSafe, arXiv 2601.23143) on Qwen3-0.6B: SFT on the model's own filtered answers.

The baseline that OPSA is compared with (configs/opsa/qwen3_0p6b.py): the same prompts, and answers of the same model.
Prepare:  python -m opsa_jax.answers self --model Qwen/Qwen3-0.6B --prompts data/safechain.jsonl --context-harmful @strict \
            --refusal-phrases english-v1 --max-new-tokens 3072 --out data/self.jsonl           (T 0.6, top-p 0.95, top-k 20, one sample)
Command:  python -m opsa_jax.train configs/baselines/qwen3_0p6b_offpolicy_self.py
Devices:  one 80 GB GPU, or a v5e:2x4 slice
Expected: safety score S 82.69 and mean reasoning 44.32 (base 51.72), as reported by the OPSA paper. Not reproduced here.
Variants: --objective.loss divergence --rollout.writer file gives the OPSA loss on the same fixed answers (offpolicy_kl).
"""

from opsa_jax import config as c


def get_config() -> c.RunConfig:
    return c.RunConfig(
        out="runs/offpolicy-self-qwen3_0p6b",
        seed=42,
        model=c.ModelConfig(path="Qwen/Qwen3-0.6B", remat="full"),
        teacher=c.TeacherConfig(context_harmful="@strict", context_benign="@helpful"),
        data=c.DataConfig(
            sources=(c.SourceConfig(path="data/self.jsonl"),),
            max_prompt_tokens=1024,
            max_teacher_prompt_tokens=1280,
            long_prompts="skip",
        ),
        rollout=c.RolloutConfig(writer="file", max_new_tokens=3072),
        objective=c.ObjectiveConfig(loss="nll", chunk=256),
        optim=c.OptimConfig(lr=1e-5, schedule="cosine", warmup=0.1, weight_decay=0.01, clip_norm=1.0),
        train=c.TrainConfig(steps=0, epochs=3, prompts_per_rollout=64, update_batch=64, micro_batch=8, save_every=100),
        evals=c.EvalConfig(suite="", refusal_phrases="english-v1"),
    )
