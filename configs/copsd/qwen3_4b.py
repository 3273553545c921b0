"""COPSD stage 2 (arXiv 2606.03089) on a text Qwen3-4B: distillation from the calibrated teacher under a constitution.

Prepare:  configs/copsd/qwen3_4b_teacher.py
Command:  python -m opsa_jax.train configs/copsd/qwen3_4b.py
Data:     data/prompts.jsonl with id, prompt, label and category, which chooses the text of the constitution (15 % of the safety prompts go
          without, as in the paper's main run)
Devices:  sixteen 80 GB GPUs, or a v5p:2x2x4 slice; 16 rollouts of up to 2,048 tokens for each prompt
Expected: swapping only the teacher (raw to Cross-SFT) moves safety and helpfulness win rates from 65.7 / 22.2 to 77.8 / 81.3 in the
          paper, on vision-language models; not reproduced here: no such machine was available.
Variants: --objective.policy.advantage token is the released code (clamped, normalised over the prompt's tokens), outcome the hybrid with
          an outcome reward (--objective.policy.reward); --objective.loss divergence --objective.divergence reverse is the exact KL.
"""

from opsa_jax import config as c


def get_config() -> c.RunConfig:
    return c.RunConfig(
        out="runs/copsd-qwen3_4b",
        model=c.ModelConfig(path="Qwen/Qwen3-4B", remat="full"),
        teacher=c.TeacherConfig(
            weights="checkpoint",
            path="runs/copsd-qwen3_4b-teacher/hf",
            constitution="@default",
            constitution_share=0.85,
            placement="user",
        ),
        data=c.DataConfig(
            sources=(c.SourceConfig(path="data/prompts.jsonl"),),
            max_prompt_tokens=2048,
            max_teacher_prompt_tokens=3072,
            long_prompts="skip",
        ),
        rollout=c.RolloutConfig(temperature=1.0, max_new_tokens=2048, samples_per_prompt=16, micro_batch=512),
        objective=c.ObjectiveConfig(
            loss="policy", policy=c.PolicyConfig(advantage="return", gamma=1.0, clip=0.2, reference_kl=0.005), chunk=256
        ),
        optim=c.OptimConfig(lr=2e-6, schedule="constant", warmup=0.0, clip_norm=1.0),
        train=c.TrainConfig(steps=0, epochs=3, prompts_per_rollout=128, update_batch=512, micro_batch=64, save_every=20),
        evals=c.EvalConfig(suite="", refusal_phrases="english-v1"),
    )
