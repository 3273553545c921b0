"""One on-policy distillation step, rollout and update, beside a PyTorch peer on the same work, alternating.

    python benchmarks/step.py MODEL PROMPTS.jsonl --rounds 3 --threads 1 \\
        --peer "PYTHON trl_opd_step.py" > figures.txt

MODEL is a Hugging Face folder (any random one will do), PROMPTS has a `prompt` per line. Every prompt is cut to --prompt-len tokens and
every response has --new-tokens (stop tokens are ignored), so both sides do the same work: 16 sequences, reverse KL over the whole
vocabulary, teacher = another copy of the same weights, AdamW. CPU seconds hold even when other jobs share the machine.
The peer is a command that takes MODEL PROMPTS --batch --prompt-len --new-tokens --threads --steps and prints one JSON line with
sec_per_step and cpu_sec_per_step.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("prompts")
    p.add_argument("--batch", type=int, default=16, help="sequences per update")
    p.add_argument("--prompt-len", type=int, default=64, help="tokens of every prompt")
    p.add_argument("--new-tokens", type=int, default=128, help="tokens of every response")
    p.add_argument("--chunk", type=int, default=256, help="our objective.chunk: tokens whose logits exist at a time")
    p.add_argument("--steps", type=int, default=6, help="timed and warm-up steps of one process")
    p.add_argument("--warmup", type=int, default=2, help="steps left out of the medians")
    p.add_argument("--threads", type=int, default=1, help="processors each side may use")
    p.add_argument("--rounds", type=int, default=3, help="processes of each side, in turn")
    p.add_argument("--peer", default="", help="command of the peer; empty times only our side")
    p.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return p.parse_args()


def ours(args: argparse.Namespace) -> dict:
    """Time the product's own sampler and update in this process."""
    import resource
    import tempfile
    import time
    from dataclasses import replace
    from pathlib import Path

    import jax
    import numpy as np

    from opsa_jax import config as c
    from opsa_jax.training import setup

    with tempfile.TemporaryDirectory() as scratch:
        prompts = Path(scratch) / "prompts.jsonl"
        lines = Path(args.prompts).read_text(encoding="utf-8").splitlines()[: args.batch * 2]
        prompts.write_text("".join(json.dumps({"prompt": json.loads(line)["prompt"], "label": "benign"}) + "\n" for line in lines))
        config = c.RunConfig(
            model=c.ModelConfig(path=args.model),
            teacher=c.TeacherConfig(context_harmful="", context_benign=""),
            data=c.DataConfig(sources=(c.SourceConfig(path=str(prompts)),)),
            rollout=c.RolloutConfig(max_new_tokens=args.new_tokens),
            objective=c.ObjectiveConfig(divergence="reverse", chunk=args.chunk),
            train=c.TrainConfig(steps=args.steps, prompts_per_rollout=args.batch, update_batch=args.batch),
        )
        run, state = setup.prepare(config)
    cfg, endless = run.student.cfg, replace(run.chat, stop_ids=())
    narrow = replace(run.prompts.checked, prompt_width=args.prompt_len, teacher_width=args.prompt_len)
    run = replace(run, sample=setup.make_sampler(config, cfg, (cfg,), endless, run.mesh), prompts=replace(run.prompts, checked=narrow))
    wall, cpu, phases = [], [], {"rollout": [], "update": []}
    with jax.set_mesh(run.mesh):
        for step in range(args.steps):
            # The first tokens of each prompt, so that prompts have the length that was asked for.
            draws = [(replace(e, prompt_ids=e.prompt_ids[-args.prompt_len :], teacher_ids=e.teacher_ids[-args.prompt_len :]), i)
                     for e, i in run.next_draws()]  # fmt: skip
            start, start_cpu = time.perf_counter(), time.process_time()
            rollout, batch = run.rollout(state, draws, step)
            jax.block_until_ready(rollout)
            middle = time.perf_counter()
            state, metrics = run.update(state, run.frozen, batch, np.int32(0))
            jax.block_until_ready((state, metrics))
            end = time.perf_counter()
            wall.append(end - start)
            cpu.append(time.process_time() - start_cpu)
            phases["rollout"].append(middle - start)
            phases["update"].append(end - middle)
    assert int(rollout.response_mask_BR.sum()) == args.batch * args.new_tokens
    median = {name: statistics.median(values[args.warmup :]) for name, values in phases.items()}
    return {
        "sec_per_step": statistics.median(wall[args.warmup :]),
        "cpu_sec_per_step": statistics.median(cpu[args.warmup :]),
        "phases": median,
        "rss_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def launch(command: list[str], threads: int) -> dict:
    """Run one process of one side on the first `threads` processors and read its JSON line."""
    pinned = sorted(os.sched_getaffinity(0))[:threads]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=lambda: os.sched_setaffinity(0, pinned), check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))


def main() -> None:
    args = arguments()
    if args.inside:
        print(json.dumps(ours(args)))
        return
    flags = ["--batch", args.batch, "--prompt-len", args.prompt_len, "--new-tokens", args.new_tokens, "--threads", args.threads]
    work = [args.model, args.prompts, *map(str, [*flags, "--steps", args.steps, "--warmup", args.warmup])]
    sides = {"opsa_jax": [sys.executable, __file__, *work, "--chunk", str(args.chunk), "--inside"]}
    if args.peer:
        sides["peer"] = [*shlex.split(args.peer), *work]
    found: dict[str, list[dict]] = {name: [] for name in sides}
    for number in range(args.rounds):
        for name, command in sides.items():
            found[name].append(launch(command, args.threads))
            print(f"round {number + 1} {name}: {found[name][-1]['cpu_sec_per_step']:.3f} CPU s", file=sys.stderr)
    print(f"{'':10s} {'CPU s/step':>12s} {'wall s/step':>12s} {'peak MiB':>10s}   (medians of {args.rounds} processes)")
    medians = {}
    for name, runs in found.items():
        medians[name] = [statistics.median(r[k] for r in runs) for k in ("cpu_sec_per_step", "sec_per_step", "rss_peak_mib")]
        print(f"{name:10s} {medians[name][0]:12.3f} {medians[name][1]:12.3f} {medians[name][2]:10.0f}")
    if args.peer:
        ratio = [a / b for a, b in zip(medians["opsa_jax"], medians["peer"])]
        print(f"{'ratio':10s} {ratio[0]:12.2f} {ratio[1]:12.2f} {ratio[2]:10.2f}   (ours / peer: below 1 is better)")
    print("phases of opsa_jax, wall s:", {k: round(v, 3) for k, v in found["opsa_jax"][-1]["phases"].items()})


if __name__ == "__main__":
    main()
