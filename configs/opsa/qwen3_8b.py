r"""OPSA (arXiv 2605.15239) on Qwen3-8B, full fine-tuning, with the settings of the paper.

Command:  python -m opsa_jax.train configs/opsa/qwen3_8b.py --model.path CHECKPOINT_FOLDER_OR_HUB_NAME
          (to choose the context for your model first: python -m opsa_jax.search --model Qwen/Qwen3-8B --harmful.path FILE \
            --benign.path FILE, then --teacher.context-harmful file:runs/search/context.txt)
Data:     data/safechain.jsonl, one object per line with id, prompt and label (harmful or benign); the paper uses the 40k prompts of
          SafeChain, labels only. Any mix works: 96 + 96 prompts already do in the paper's low-data setting (--train.epochs 30).
Devices:  eight 80 GB GPUs, or a v5e:16x16, v5p:4x4x4 or v6e:8x8 slice
Expected: safety score S from 96.08 (off-policy self-distillation) to 96.38, mean reasoning 86.58 (base 84.04),
          as reported by the paper (S = 1 - mean of three harm and two over-refusal rates). Not reproduced here: no such machine
          was available.
"""

from opsa_jax import config as c


def get_config() -> c.RunConfig:
    return c.RunConfig(
        out="runs/opsa-qwen3_8b",
        seed=42,
        model=c.ModelConfig(path="Qwen/Qwen3-8B", remat="full"),
        teacher=c.TeacherConfig(context_harmful="@strict", context_benign="@helpful"),
        data=c.DataConfig(
            sources=(c.SourceConfig(path="data/safechain.jsonl"),),
            max_prompt_tokens=1024,
            max_teacher_prompt_tokens=1280,
            long_prompts="skip",
        ),
        rollout=c.RolloutConfig(temperature=0.6, max_new_tokens=3072),
        objective=c.ObjectiveConfig(divergence="mix", mix=0.5, chunk=256),
        optim=c.OptimConfig(lr=1e-5, schedule="cosine", warmup=0.1, weight_decay=0.01, clip_norm=1.0),
        train=c.TrainConfig(steps=0, epochs=3, prompts_per_rollout=128, update_batch=64, save_every=100),
        evals=c.EvalConfig(suite="", refusal_phrases="english-v1"),
    )
