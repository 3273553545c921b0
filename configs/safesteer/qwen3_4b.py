r"""SafeSteer (arXiv 2606.02530) on Qwen3-4B-Instruct-2507: a steered teacher and reverse KL on 50 safety tokens, full fine-tuning.

Data:     data/harmful.jsonl and data/harmless.jsonl with id and prompt: 128 + 32 of each for the direction (the harmful set of Arditi et
          al. 2024, for example from AdvBench and HarmBench, and Alpaca instructions), and 100 harmful prompts to train on (the first 100
          of data/train_harmful.jsonl). No general data.
Prepare:  python -m opsa_jax.steer --model Qwen/Qwen3-4B-Instruct-2507 --harmful.path data/harmful.jsonl \
            --harmless.path data/harmless.jsonl --horizon 7 --min-steered-prob 1e-8 --out runs/steer-qwen3_4b
          (prints what the steered model does, and the tokens; look at both before training)
Command:  python -m opsa_jax.train configs/safesteer/qwen3_4b.py
Devices:  two 80 GB GPUs (8B: four), or a v5e:4x4 slice
Expected: ASR 2.87 -> 0.91 and general ability 71.68 -> 71.39, as reported by the paper; not reproduced here: no such machine was
          available. On the sandbox the published partial sum pushes the wrong way (docs/science.md); --objective.subset generalised is
          the sum whose least point is the teacher.
Variants: teacher by a prompt instead of a direction: steer --mode prompt, then --teacher.steering '' --teacher.context-harmful TEXT.
"""

from opsa_jax import config as c


def get_config() -> c.RunConfig:
    return c.RunConfig(
        out="runs/safesteer-qwen3_4b",
        model=c.ModelConfig(path="Qwen/Qwen3-4B-Instruct-2507", remat="full"),
        teacher=c.TeacherConfig(context_harmful="", context_benign="", steering="runs/steer-qwen3_4b/direction.safetensors"),
        data=c.DataConfig(
            sources=(c.SourceConfig(path="data/train_harmful.jsonl", label="harmful", limit=100),),
            max_prompt_tokens=512,
            max_teacher_prompt_tokens=512,
            long_prompts="skip",
        ),
        rollout=c.RolloutConfig(temperature=1.0, max_new_tokens=512, samples_per_prompt=8),
        objective=c.ObjectiveConfig(
            divergence="reverse",
            support="tokens",
            tokens="runs/steer-qwen3_4b/tokens.json",
            subset="raw",
            reduction="sequence_mean",
            chunk=256,
        ),
        optim=c.OptimConfig(lr=1e-5, schedule="cosine", warmup=0.1, clip_norm=1.0),
        train=c.TrainConfig(steps=0, epochs=1, prompts_per_rollout=4, update_batch=32),
        evals=c.EvalConfig(suite="", refusal_phrases="english-v1"),
    )
