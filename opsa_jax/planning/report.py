"""A plan on the screen."""

from rich.console import Console
from rich.table import Table

from opsa_jax.planning.planner import Plan, by_kind

GIB = 2**30


def show(plan: Plan, console: Console) -> None:
    """Memory, verdict, collectives, work and roofline."""
    shapes, chip = plan.shapes, plan.topology.chip
    c = shapes.config
    mesh = " ".join(f"{name}={size}" for name, size in plan.mesh.items())
    execution = f"{shapes.cfg.compute_dtype}, remat {c.model.remat}"
    console.print(f"model     {c.model.path}: {shapes.cfg.family}, {shapes.cfg.n_params:,} weights; {execution}")
    console.print(f"devices   {len(plan.topology.devices)} x {chip.name} ({plan.topology.name}), mesh {mesh}")
    at_a_time = f" {c.rollout.micro_batch} at a time" if c.rollout.micro_batch else ""
    console.print(
        f"batch     rollout {shapes.rows} x ({shapes.prompt} + {shapes.room}) tokens{at_a_time}, update {c.train.update_batch}, "
        f"micro-batch {c.train.micro_batch or c.train.update_batch}, teacher's prompt {shapes.teacher_prompt}"
    )
    console.print(_memory(plan))
    console.print(verdict(plan))
    if not plan.fits:
        console.print("          try more fsdp or tensor, smaller --train.micro-batch or --rollout.micro-batch, remat full, or --search")
    for name, program in plan.programs.items():
        if program.collectives:
            console.print(_collectives(plan, name))
    console.print(_work(plan))
    if plan.step_seconds is not None:
        console.print(f"step      at least {plan.step_seconds:.2f} s per update with its share of the rollout (a real step is slower)")


def verdict(plan: Plan) -> str:
    """One line: fits or not, and by how much."""
    if plan.limit is None:
        return f"peak      {plan.peak / GIB:.2f} GiB per device; the limit of this device is not known"
    margin = (plan.limit - plan.peak) / GIB
    worst = max(plan.peaks, key=lambda name: plan.peaks[name])
    if plan.fits:
        return f"fits      peak {plan.peak / GIB:.2f} of {plan.limit / GIB:.2f} GiB per device ({worst}), {margin:.2f} GiB free"
    return f"DOES NOT FIT: {worst} needs {plan.peak / GIB:.2f} GiB per device of {plan.limit / GIB:.2f}, {-margin:.2f} GiB too much"


def _memory(plan: Plan) -> Table:
    unit, name = (GIB, "GiB") if plan.peak > GIB / 4 else (2**20, "MiB")
    table = Table(f"{name} per device", *plan.programs, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for what, size in plan.resident.items():
        if size:
            table.add_row(what, *[f"{size / unit:.3f}" for _ in plan.programs])
    table.add_row("cache", *[f"{plan.cache / unit:.3f}" if name == "rollout" else "-" for name in plan.programs])
    table.add_row("activations, temporaries", *[f"{plan.temporary(n) / unit:.3f}" for n in plan.programs])
    table.add_row("peak", *[f"{plan.peaks[n] / unit:.3f}" for n in plan.programs])
    table.add_row("program code", *[f"{p.code / unit:.3f}" for p in plan.programs.values()])
    table.add_row("compile seconds", *[f"{p.compile_seconds:.0f}" for p in plan.programs.values()])
    return table


def _collectives(plan: Plan, name: str) -> Table:
    table = Table(f"{name}: collectives", "in text", "runs", "GiB", "GiB sent", "largest MiB", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, row in by_kind(plan.programs[name]).items():
        sizes = f"{row['bytes'] / GIB:.2f}", f"{row['sent_bytes'] / GIB:.2f}", f"{row['largest_bytes'] / 2**20:.1f}"
        table.add_row(kind, f"{row['operations']}", f"{row['runs']:,}", *sizes)
    return table


def _work(plan: Plan) -> Table:
    titles = "per call", "TFLOP", "GFLOP/token", "HBM MB/token", "compute s", "memory s", "interconnect s", "bound by"
    table = Table(*titles, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, cost in plan.costs.items():
        roof = plan.rooflines[name]
        seconds = ["-" if x is None else f"{x:.3f}" for x in (roof.compute, roof.memory, roof.interconnect)]
        moved = cost.bytes * len(plan.topology.devices) / cost.tokens
        work = f"{cost.flops / 1e12:,.0f}", f"{cost.flops / cost.tokens / 1e9:.1f}", f"{moved / 1e6:.2f}"
        table.add_row(name, *work, *seconds, roof.bound)
    return table
