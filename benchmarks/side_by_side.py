"""What benchmarks of one function share: each variant in a fresh process, times and peak memory, ratios to the first row."""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence


def add_flags(ap: argparse.ArgumentParser, variants: Sequence[str]) -> None:
    ap.add_argument("--repeat", type=int, default=5, help="timed calls per process; the median counts")
    ap.add_argument("--rounds", type=int, default=1, help="processes per variant")
    ap.add_argument("--variants", nargs="+", choices=variants, default=variants)
    ap.add_argument("--one", choices=variants, help=argparse.SUPPRESS)


def measured(call: Callable, repeat: int, on_device: bool) -> tuple[dict, object]:
    """Median wall and CPU seconds and peak MiB of a call in this process, and what its first call, which is not timed, gave.

    Args:
        on_device: whether jax computes, so that an accelerator's own peak counts.
    """
    before = peak_rss_mib()
    first = call()
    wall, cpu = median_seconds(call, repeat)
    peak = peak_rss_mib() - before
    if on_device:
        import jax

        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", peak * 2**20) / 2**20
    return {"wall": wall, "cpu": cpu, "peak": peak}, first


def median_seconds(call: Callable, repeat: int) -> tuple[float, float]:
    """Wall and CPU seconds."""
    taken = []
    for _ in range(repeat):
        start, cpu_start = time.perf_counter(), time.process_time()
        call()
        taken.append((time.perf_counter() - start, time.process_time() - cpu_start))
    wall, cpu = zip(*taken)
    return statistics.median(wall), statistics.median(cpu)


def peak_rss_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def compare(args: argparse.Namespace, variants: Sequence[str], title: str, header: str, tail: Callable[[dict], str]) -> None:
    """Run this script with `--one VARIANT`, which prints a line of JSON, for each variant in turn, and print the table.

    Args:
        title: what was computed, for the line above the table.
        header: of the columns that `tail` makes of a variant's first JSON line.
    """
    results: dict[str, list] = {v: [] for v in variants}
    for _ in range(args.rounds):
        for variant in variants:
            results[variant].append(_in_process(variant))
    print(f"{title}; {args.rounds} x median of {args.repeat}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"{'':14}{'wall s':>9}{'ratio':>8}{'CPU s':>9}{'ratio':>8}{'peak MiB':>10}{'ratio':>8}{header}")
    base = None
    for variant, runs in results.items():
        if broken := [r for r in runs if isinstance(r, str)]:
            print(f"{variant:14}{broken[0]}")
            continue
        row = {key: statistics.median(r[key] for r in runs) for key in ("wall", "cpu", "peak")}
        base = base or row
        numbers = f"{row['wall']:9.3f}{row['wall'] / base['wall']:8.2f}{row['cpu']:9.3f}{row['cpu'] / base['cpu']:8.2f}"
        print(f"{variant:14}{numbers}{row['peak']:10.0f}{row['peak'] / base['peak']:8.2f}{tail(runs[0])}")


def _in_process(variant: str) -> dict | str:
    """The JSON line of a fresh process, or why there is none."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run([sys.executable, *sys.argv, "--one", variant], capture_output=True, text=True, env=environment)
    if done.returncode:
        return f"failed: {(done.stderr.strip().splitlines() or ['killed, out of memory?'])[-1][:90]}"
    return json.loads(done.stdout.splitlines()[-1])
