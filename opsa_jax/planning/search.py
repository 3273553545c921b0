"""Meshes, remat policies and micro-batches, tried in the order of what they promise, and ranked."""

import dataclasses
from collections.abc import Callable, Iterator

from opsa_jax.config import MeshConfig, RunConfig
from opsa_jax.errors import UserError
from opsa_jax.parallel.mesh import make_mesh
from opsa_jax.parallel.topology import Topology
from opsa_jax.planning import costs
from opsa_jax.planning.planner import Plan, check_shapes, make_plan, shapes_of
from opsa_jax.planning.programs import abstract, resident

REMAT = ("none", "dots", "full")


def candidates(config: RunConfig, devices: int) -> Iterator[RunConfig]:
    """Every mesh of this many devices (one copy of the weights, or two to eight), remat policy, and micro-batch of a power of two."""
    t = config.train
    for tensor in (1, 2, 4, 8):
        for data in (1, 2, 4, 8):
            if devices % (tensor * data):
                continue
            mesh = MeshConfig(data=data, fsdp=devices // (tensor * data), tensor=tensor)
            for passes in (1, 2, 4, 8, 16, 32):
                if t.update_batch % passes:
                    continue
                train = dataclasses.replace(t, micro_batch=t.update_batch // passes)
                for remat in REMAT:
                    yield dataclasses.replace(config, mesh=mesh, train=train, model=dataclasses.replace(config.model, remat=remat))


def promising(config: RunConfig, topology: Topology) -> list[RunConfig]:
    """Candidates that divide and whose weights alone fit, by an estimate of their time; nothing is compiled.

    The estimate is the roofline with the weights' collectives by hand, and each tensor split's all-reduces of activations.
    """
    found = []
    for candidate in candidates(config, len(topology.devices)):
        shapes = shapes_of(candidate, topology.platform)
        try:
            mesh = make_mesh(candidate.mesh, topology.devices)
            check_shapes(shapes, mesh)
        except UserError:
            continue
        sizes = dict(mesh.shape)
        arrays, _ = abstract(shapes, mesh)
        there = resident(arrays)
        least = sum(there.values()) + saved_bytes(candidate, shapes.cfg, sizes, shapes)
        if topology.chip.hbm_bytes and least > topology.chip.hbm_bytes:
            continue
        cost = costs.update_cost(shapes, sizes, there["parameters"] + there["optimizer"])
        sent = _sent(candidate, shapes.cfg, sizes, shapes)
        roof = costs.roofline(cost, topology.chip, len(topology.devices), sent)
        # Candidates that this cannot tell apart: those that keep less come first.
        found.append(((roof.serial or cost.flops + sent, least), len(found), candidate))
    return [candidate for _, _, candidate in sorted(found)]


def saved_bytes(config: RunConfig, cfg, mesh: dict[str, int], shapes) -> float:
    """What the forward pass keeps for the backward pass, on one device."""
    tokens = (config.train.micro_batch or config.train.update_batch) / (mesh["data"] * mesh["fsdp"]) * (shapes.prompt + shapes.room)
    whole, wide = costs.block_widths(cfg, mesh["tensor"])
    kept = {"full": cfg.d_model, "dots": 3 * cfg.d_model + whole + wide, "none": 8 * cfg.d_model + whole + 2 * wide}
    return tokens * cfg.n_layers * kept[config.model.remat] * 2


def _sent(config: RunConfig, cfg, mesh: dict[str, int], shapes) -> float:
    """Bytes a device sends in an update: weights gathered per pass, gradients scattered, activations summed over tensor."""
    passes, micro = (4 if config.model.remat == "full" else 3), config.train.update_batch // config.train.micro_batch
    weights = cfg.n_layers * costs.block_weights(cfg) * 2 / mesh["tensor"] * (mesh["fsdp"] > 1)
    gradients = weights * (2 if mesh["data"] > 1 else 1)
    tokens = config.train.update_batch * (shapes.prompt + shapes.room) / (mesh["data"] * mesh["fsdp"])
    activations = 2 * 2 * tokens * cfg.n_layers * cfg.d_model * 2 * (mesh["tensor"] > 1) * passes
    head = cfg.d_model * cfg.vocab_size / mesh["tensor"] * (2 * 2 + 2 * 4) * (mesh["fsdp"] > 1)
    return (weights * (passes - 1) + gradients + head) * micro + activations


def search(config: RunConfig, topology: Topology, limit: int, say: Callable[[str], None]) -> list[Plan]:
    """Compile the most promising candidates until `limit` fit (at most four times as many). Those that fit come back first, ordered by
    their roofline's times added up, which tells apart what its maximum does not.

    Raises:
        UserError: no mesh divides, or not even the weights fit.
    """
    chosen = promising(config, topology)
    if not chosen:
        raise UserError(
            f"--search: no mesh of {len(topology.devices)} devices divides {config.model.path} and a batch of {config.train.update_batch} "
            f"within {(topology.chip.hbm_bytes or 0) / 2**30:.2f} GiB; choose a larger topology or another --train.update-batch"
        )
    say(f"{len(chosen)} candidates divide and may fit; compiling the most promising until {limit} fit")
    plans: list[Plan] = []
    for i, candidate in enumerate(chosen[: 4 * limit], 1):  # those that do not fit are refused within seconds
        m = candidate.mesh
        choice = f"mesh {m.data},{m.fsdp},{m.tensor} remat {candidate.model.remat} micro {candidate.train.micro_batch}"
        say(f"[{i}/{min(4 * limit, len(chosen))}] {choice}")
        plans.append(make_plan(candidate, topology, say=say))
        if sum(p.fits for p in plans) == limit:
            break
    return sorted(plans, key=lambda p: (not p.fits, p.serial_seconds, p.peak))
