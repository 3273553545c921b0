"""What a step must compute, read and send, and the least time that takes: a roofline.

FLOPs are counted by hand from the architecture (a multiply-add is two), because the compiler counts the body of a loop once. Memory
traffic counts weights, optimizer state, cache and the activations between blocks, which is a lower bound. Collectives come from the
compiled text. Each time is work divided by the peak of the chip; compute, memory and interconnect are taken to overlap fully, so the
estimate is the largest of the three, and a real step is slower. Responses are taken to fill their room.
"""

from dataclasses import dataclass

from opsa_jax.models.config import DecoderConfig
from opsa_jax.objectives.objective import needs_reference, needs_scores, scores_need_teacher, updates_need_teacher
from opsa_jax.parallel.topology import Chip
from opsa_jax.planning.hlo import Collective
from opsa_jax.planning.programs import Shapes
from opsa_jax.rollout.sampler import cache_sizes
from opsa_jax.training.setup import micro_batches, rollout_parts

_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Cost:
    """Of one call of a program."""

    flops: float
    """Over all devices, with what the backward pass recomputes."""
    useful_flops: float
    """Without that."""
    bytes: float
    """Memory traffic of one device."""
    tokens: int
    """Tokens of the batch that the call works on: prompt and response of every sequence."""


@dataclass(frozen=True)
class Roofline:
    """Least seconds of one call; None where the chip's figure is not known."""

    compute: float | None
    memory: float | None
    interconnect: float | None

    @property
    def seconds(self) -> float | None:
        known = [x for x in (self.compute, self.memory, self.interconnect) if x is not None]
        return max(known) if self.compute is not None else None

    @property
    def serial(self) -> float:
        """Seconds if nothing overlapped, 0 where nothing is known."""
        return sum(x or 0.0 for x in (self.compute, self.memory, self.interconnect))

    @property
    def bound(self) -> str:
        parts = {"compute": self.compute, "memory": self.memory, "interconnect": self.interconnect}
        return max(parts, key=lambda name: parts[name] or 0.0) if self.compute is not None else "unknown"


def block_weights(cfg: DecoderConfig, experts: int | None = None) -> int:
    """Weights of the matrices of one block, with this many of its experts (all)."""
    heads = 2 * cfg.n_heads + 2 * cfg.n_kv_heads
    experts = cfg.n_experts if experts is None else experts
    return cfg.d_model * (heads * cfg.head_dim + 3 * cfg.d_ff * (experts or 1) + cfg.n_experts)


def block_widths(cfg: DecoderConfig, tensor: int) -> tuple[int, float]:
    """Columns of a token between the matrices of a block: whole ones (what experts give back, before their sum), and those of a device."""
    heads = (2 * cfg.n_heads + 2 * cfg.n_kv_heads) * cfg.head_dim
    return cfg.experts_per_token * cfg.d_model, (heads + 3 * cfg.d_ff * (cfg.experts_per_token or 1)) / tensor


def forward_flops(cfg: DecoderConfig, columns: int, cached: int = 0) -> float:
    """One sequence through all blocks, without the head: `columns` new columns behind `cached` ones.

    >>> tiny = DecoderConfig("qwen3", 64, 16, 1, 4, 2, 8, 32)
    >>> forward_flops(tiny, 1) == 2 * block_weights(tiny) + 4 * 4 * 8 * 1  # one query sees one key
    True
    """
    pairs = 0
    for window in cfg.windows or (0,) * cfg.n_layers:
        seen = columns * cached + columns * (columns + 1) // 2
        if window and cached + columns > window:
            seen = min(seen, columns * window)
        pairs += seen
    return 2.0 * block_weights(cfg, cfg.experts_per_token) * cfg.n_layers * columns + 4.0 * cfg.n_heads * cfg.head_dim * pairs


def head_flops(cfg: DecoderConfig, positions: int) -> float:
    """Logits of `positions` positions."""
    return 2.0 * cfg.d_model * cfg.vocab_size * positions


def rollout_cost(shapes: Shapes, mesh: dict[str, int]) -> Cost:
    """Prefill and decoding of a whole rollout batch."""
    cfg, P, R, rows = writer(shapes), writer_prompt(shapes), shapes.room, shapes.rows
    flops = rows * (forward_flops(cfg, P) + forward_flops(cfg, R, P) + head_flops(cfg, R))
    weights = (cfg.n_params - (0 if cfg.tie_embeddings else cfg.vocab_size * cfg.d_model)) * _SIZE[cfg.compute_dtype] / mesh["tensor"]
    per_column = cache_bytes(shapes, mesh, 1)
    start, read = P, 0.0
    for columns in cache_sizes(P, R):  # attention reads the whole room of the stage
        read += (columns - start) * columns * per_column
        start = columns
    times = rollout_parts(shapes.config)
    return Cost(flops, flops, times * (R * weights + read), rows * (P + R))


def writer(shapes: Shapes) -> DecoderConfig:
    """Who writes the responses."""
    return (shapes.teacher_cfgs or (shapes.cfg,))[0] if shapes.config.rollout.writer == "teacher" else shapes.cfg


def writer_prompt(shapes: Shapes) -> int:
    """Columns of its prompt."""
    return shapes.teacher_prompt if shapes.config.rollout.writer == "teacher" else shapes.prompt


def cache_bytes(shapes: Shapes, mesh: dict[str, int], columns: int) -> float:
    """Keys and values of this many columns on one device, of the rows that are sampled at a time."""
    cfg = writer(shapes)
    rows = shapes.rows / rollout_parts(shapes.config) / (mesh["data"] * mesh["fsdp"])
    return 2.0 * cfg.n_layers * rows * cfg.n_kv_heads * cfg.head_dim * columns * _SIZE[cfg.compute_dtype] / mesh["tensor"]


def update_cost(shapes: Shapes, mesh: dict[str, int], state_bytes: int) -> Cost:
    """One optimizer update: teacher forward, student forward and backward, heads, AdamW.

    Args:
        state_bytes: parameters and optimizer state on one device.
    """
    config, cfg, rows = shapes.config, shapes.cfg, shapes.config.train.update_batch
    P, Q, R = shapes.prompt, shapes.teacher_prompt, shapes.room
    lora, teachers = config.model.lora.rank > 0, shapes.teacher_cfgs or (cfg,)
    student = forward_flops(cfg, P + R - 1)
    heads = 2 + (not lora)  # logits, and the gradients of hidden states and head
    # Adapters: the gradient passes through all matrices, but none of them gets one.
    useful = rows * (student * (2 if lora else 3) + heads * head_flops(cfg, R))
    recomputed = rows * student if config.model.remat == "full" else 0.0
    if config.objective.loss != "divergence":
        recomputed += rows * head_flops(cfg, R)
    passes = 3 if config.model.remat == "full" else 2
    traffic = _pass_bytes(cfg, mesh, rows, P + R - 1, micro_batches(config)) * passes
    if updates_need_teacher(config.objective):
        teacher = max(forward_flops(t, Q + R - 1) + head_flops(t, R) for t in teachers)
        useful += rows * teacher
        traffic += _pass_bytes(teachers[0], mesh, rows, Q + R - 1, micro_batches(config))
    return Cost(useful + recomputed, useful, traffic + 3.0 * state_bytes, rows * (P + R))


def score_cost(shapes: Shapes, mesh: dict[str, int]) -> Cost | None:
    """One pass of student, teacher and reference over the rollout batch, for objectives that need it."""
    config, cfg, rows, R = shapes.config, shapes.cfg, shapes.rows, shapes.room
    if not needs_scores(config.objective):
        return None
    passes = [(cfg, shapes.prompt)]
    if scores_need_teacher(config.objective):
        passes.append(((shapes.teacher_cfgs or (cfg,))[0], shapes.teacher_prompt))
    if needs_reference(config.objective):
        passes.append((cfg, shapes.prompt))
    flops = sum(rows * (forward_flops(c, p + R - 1) + head_flops(c, R)) for c, p in passes)
    micro = shapes.updates * micro_batches(config)
    return Cost(flops, flops, sum(_pass_bytes(c, mesh, rows, p + R - 1, micro) for c, p in passes), rows * (shapes.prompt + R))


def _pass_bytes(cfg: DecoderConfig, mesh: dict[str, int], rows: int, columns: int, micro: int) -> float:
    """One device's traffic of one pass over the blocks: gathered weights once per micro-batch, and each block's arrays in and out."""
    size, tensor = _SIZE[cfg.compute_dtype], mesh["tensor"]
    weights = cfg.n_layers * block_weights(cfg) * size / tensor * micro
    widths = 4 * cfg.d_model + sum(block_widths(cfg, tensor))
    tokens = rows * columns / (mesh["data"] * mesh["fsdp"])
    return weights + 2 * tokens * cfg.n_layers * widths * size


def roofline(cost: Cost, chip: Chip, devices: int, sent: float | None) -> Roofline:
    """Least times of a program.

    Args:
        sent: bytes that leave a device for others (`wire_bytes` of its collectives); None where they are not known.
    """
    if chip.flops is None:
        return Roofline(None, None, None)
    return Roofline(cost.flops / devices / chip.flops, cost.bytes / chip.hbm_bandwidth, None if sent is None else sent / chip.ici_bandwidth)


def sent_bytes(found: list[Collective]) -> float:
    """Bytes that leave a device in one call."""
    return sum(c.wire_bytes * c.runs for c in found)
