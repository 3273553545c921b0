r"""COPSD stage 1 (arXiv 2606.03089) on a text Qwen3-4B: Cross-SFT cold start of the TEACHER, constitution always in the input.

Prepare:  python -m opsa_jax.answers cross --model Qwen/Qwen3-4B --prompts data/prompts.jsonl --constitution @default \
            --sources endpoint --out data/cross.jsonl           (or --sources checkpoint:PATH, file:ANSWERS.jsonl, self)
          data/prompts.jsonl: 5,000 prompts with id, prompt, label and, for harmful ones, category; half general and over-refusal
          prompts (answered by the base itself), half safety prompts. The paper works on vision-language models; this applies its
          method to text.
Command:  python -m opsa_jax.train configs/copsd/qwen3_4b_teacher.py          (then configs/copsd/qwen3_4b.py)
Devices:  two 80 GB GPUs, or a v5e:4x4 slice
Expected: a teacher that refuses with reasons and keeps the base's length; two epochs only (the paper: five collapse it, and dropping
          the self-generated half costs capability). Not reproduced here: no such machine was available.
"""

from opsa_jax import config as c


def get_config() -> c.RunConfig:
    return c.RunConfig(
        out="runs/copsd-qwen3_4b-teacher",
        model=c.ModelConfig(path="Qwen/Qwen3-4B", remat="full"),
        data=c.DataConfig(sources=(c.SourceConfig(path="data/cross.jsonl"),), max_prompt_tokens=2048, long_prompts="skip"),
        rollout=c.RolloutConfig(writer="file", max_new_tokens=2048),
        objective=c.ObjectiveConfig(loss="nll", chunk=256),
        optim=c.OptimConfig(lr=1e-5, schedule="cosine", warmup=0.1, weight_decay=0.01, clip_norm=1.0),
        train=c.TrainConfig(steps=0, epochs=2, prompts_per_rollout=64, update_batch=64, micro_batch=16),
        evals=c.EvalConfig(suite="", refusal_phrases="english-v1"),
    )
