"""The whole run as frozen dataclasses. The field docs below are what `python -m opsa_jax.train --help` prints.

Declared once: defaults (the sandbox run), command-line flags, `--help`, `--print-config`, validation and the resolved
`config.json` of a run directory all follow from these classes. A recipe is a Python file with `get_config() -> RunConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters instead of full fine-tuning (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = 0
    """Rank of the adapters; 0 trains all weights."""
    alpha: float = 32.0
    """The low-rank product is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    """Projections that get an adapter: any of q, k, v, o, gate, up, down."""


@dataclass(frozen=True)
class ModelConfig:
    """The student."""

    path: str = "sandbox:base"
    """Checkpoint: a local folder in Hugging Face format, a hub name (org/name), or sandbox:base, the embedded tiny model."""
    revision: str = "main"
    """Branch, tag or commit of a hub checkpoint."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the trained weights and of the optimizer moments."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the matrix products: auto is bfloat16 on TPU and GPU and float32 on CPU."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes per block: none, dots (keep only matrix products) or full (keep only block inputs)."""
    scan_unroll: int = 1
    """Blocks per iteration of the layer scan; the number of layers unrolls it (faster for tiny models, slower to compile)."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Reasoning switch of the chat template (enable_thinking); auto leaves it to the template."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters."""


@dataclass(frozen=True)
class TeacherConfig:
    """Who supervises, and what it sees that the student does not."""

    weights: Literal["frozen", "ema", "checkpoint"] = "frozen"
    """frozen: the initial student (OPSA); ema: a moving average of the student; checkpoint: the model at `path`."""
    path: str = ""
    """Checkpoint of the teacher, with weights=checkpoint."""
    ema_decay: float = 0.999
    """Decay per update, with weights=ema."""
    context_harmful: str = "@sandbox-strong"
    """Context for prompts labelled harmful: a text, @name of a shipped context, file:PATH, or empty for none."""
    context_benign: str = "@sandbox-helpful"
    """Context for prompts labelled benign, likewise."""
    placement: Literal["system", "user"] = "system"
    """Where the context goes: a system message, or the start of the user turn."""


@dataclass(frozen=True)
class SourceConfig:
    """One set of prompts."""

    path: str = "sandbox:train.jsonl"
    """A .jsonl, .csv, .parquet or .arrayrecord file, hf:NAME, tfds:NAME, or sandbox:FILE for an embedded file."""
    split: str = "train"
    """Split of an hf: or tfds: set."""
    weight: float = 1.0
    """Share of this source in the mixture, relative to the others."""
    label: str = ""
    """Label given to every record (harmful or benign), for sets that have no label column."""
    where: str = ""
    """Keep only records whose field has this value, written FIELD=VALUE."""
    prompt_field: str = "prompt"
    """Field with the user's text."""
    label_field: str = "label"
    """Field with harmful or benign."""
    category_field: str = "category"
    """Field with the category (optional)."""
    id_field: str = "id"
    """Field with the record's id; the record's number where the field is absent."""
    response_field: str = "response"
    """Field with a given response (optional; used by off-policy recipes)."""
    teacher_field: str = "teacher"
    """Field that names the record's teacher (optional)."""
    limit: int = 0
    """Use only the first this many records; 0 is all."""


@dataclass(frozen=True)
class DataConfig:
    """The prompts of the run."""

    sources: tuple[SourceConfig, ...] = (SourceConfig(where="label=harmful"), SourceConfig(where="label=benign"))
    """Sources, mixed by weight. The default is half harmful and half benign prompts of the sandbox."""
    shuffle: bool = True
    """Shuffle each source anew in every epoch."""
    bad_records: Literal["error", "skip"] = "error"
    """What a malformed record does: stop with file, line and field, or be skipped and counted."""
    max_prompt_tokens: int = 0
    """Room for the student's templated prompt; 0 takes the longest prompt of the data."""
    max_teacher_prompt_tokens: int = 0
    """Room for the teacher's templated prompt with its context; 0 takes the longest."""
    long_prompts: Literal["error", "skip"] = "error"
    """What a prompt longer than its room does."""


@dataclass(frozen=True)
class RolloutConfig:
    """How the student samples the responses it is trained on."""

    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with this much probability."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one."""
    max_new_tokens: int = 64
    """Room for the response."""
    samples_per_prompt: int = 1
    """Responses per prompt."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """Divergence between student and teacher at every response token, and how it is summed."""

    divergence: Literal["forward", "reverse", "mix", "jsd"] = "mix"
    """forward = KL(teacher, student), reverse = KL(student, teacher), mix = a*forward + (1-a)*reverse, jsd = JSD(b)."""
    mix: float = 0.5
    """a of mix (OPSA, arXiv 2605.15239, App. F: 0.5)."""
    beta: float = 0.5
    """b of jsd: the mixture distribution is b*teacher + (1-b)*student."""
    support: Literal["full", "teacher_topk", "student_topk"] = "full"
    """Tokens the divergence is summed over: the whole vocabulary, or the top k of teacher or student."""
    subset: Literal["raw", "generalised", "renormalise", "tail"] = "renormalise"
    """On a top-k support: the raw partial sum, that sum made least at equality, both sides renormalised, or a bucket for the rest."""
    k: int = 512
    """k of the top-k supports."""
    temperature: float = 1.0
    """Divides the logits of both sides in the loss (not the sampling temperature)."""
    reduction: Literal["token_mean", "sequence_mean"] = "token_mean"
    """Mean over all response tokens of the update batch, or mean over sequences of their token means."""
    chunk: int = 1024
    """Tokens whose logits exist at the same time (per device)."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW."""

    lr: float = 3e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "constant", "linear"] = "cosine"
    """Shape after the warm-up."""
    warmup: float = 0.1
    """Linear warm-up: a share of all updates (below 1) or a number of updates (1 and above)."""
    final_lr: float = 0.0
    """Rate at the end of cosine or linear, as a share of the peak."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled decay of matrices (norm scales and biases are left out)."""
    clip_norm: float = 1.0
    """Clip gradients to this global norm; 0 turns it off."""


@dataclass(frozen=True)
class TrainConfig:
    """Length and batch sizes of the run."""

    steps: int = 30
    """Optimizer updates; 0 derives them from epochs."""
    epochs: float = 1.0
    """Passes over the data, with steps=0."""
    prompts_per_rollout: int = 32
    """Prompts sampled with the same weights."""
    update_batch: int = 32
    """Sequences per optimizer update; a rollout batch gives prompts_per_rollout * samples_per_prompt / update_batch updates."""
    micro_batch: int = 0
    """Sequences per forward/backward pass inside an update (gradient accumulation, exact in tokens); 0 is update_batch."""
    save_every: int = 0
    """Updates between checkpoints; 0 saves only at the end. Rounded up to whole rollout batches."""
    keep: int = 2
    """Checkpoints kept."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices. One axis may be -1: what is left."""

    data: int = 1
    """Copies of the weights, each with its own part of the batch."""
    fsdp: int = -1
    """Weights, optimizer state and batch split over this axis."""
    tensor: int = 1
    """Heads, feed-forward units and vocabulary split over this axis."""


@dataclass(frozen=True)
class LogConfig:
    """What the run shows and writes besides metrics.jsonl."""

    tensorboard: bool = False
    """Also write TensorBoard files (extra: tensorboard)."""
    wandb: str = ""
    """Also log to this Weights & Biases project (extra: wandb)."""
    samples_every: int = 10
    """Updates between tables of sample responses; 0 for none."""
    samples: int = 3
    """Rows of the table."""
    show_harmful: bool = False
    """Print responses to harmful prompts in full instead of redacting what complies."""
    progress: bool = True
    """Show the progress bar."""


@dataclass(frozen=True)
class EvalConfig:
    """What is scored, and how responses are sampled for it."""

    suite: str = "sandbox"
    """Suite scored before and after training: sandbox, a JSONL file in its format (evals/suite.py), or empty for none."""
    max_new_tokens: int = 64
    """Room for the response."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    refusal_phrases: str = "sandbox-v1"
    """List of refusal phrases that decides what is a refusal: sandbox-v1, english-v1."""
    batch: int = 256
    """Prompts sampled at a time."""
    limit: int = 0
    """Prompts per metric; 0 is all."""


@dataclass(frozen=True)
class ExportConfig:
    """The Hugging Face checkpoint written at the end."""

    enabled: bool = True
    """Write OUT/hf at the end."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the exported weights; auto is the dtype of the imported ones."""
    merge_lora: bool = True
    """Merge adapters into the weights; otherwise write them as a PEFT adapter."""


@dataclass(frozen=True)
class RunConfig:
    """A training run. Every field can be set on the command line: --optim.lr 2e-6."""

    out: str = "runs/sandbox-opsa"
    """Run directory; it must not exist, unless --resume continues it."""
    resume: bool = False
    """Continue the run in the run directory from its last checkpoint."""
    seed: int = 0
    """Seed of data order, sampling and initialisation."""
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    log: LogConfig = field(default_factory=LogConfig)
    evals: EvalConfig = field(default_factory=EvalConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
