"""The whole run as frozen dataclasses: defaults (the sandbox run), flags, `--help`, `--print-config` and the `config.json` of a run
directory all follow from these classes. A recipe is a Python file with `get_config() -> RunConfig`.
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
    """Projections that get an adapter: any of q, k, v, o, gate, up, down; q, k, v, o where feed-forwards are experts."""


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
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    """Attention of training and prefill: auto is splash on TPU, cuDNN on NVIDIA GPUs in bfloat16, and XLA elsewhere."""
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
    routes: tuple[str, ...] = ()
    """Several teachers instead of one, each written NAME=CHECKPOINT: a record's teacher field names the one that supervises it."""
    constitution: str = ""
    """One context per category instead of one per label (COPSD): @default, @sandbox, or file:PATH of a JSON file."""
    constitution_share: float = 1.0
    """Share of the harmful prompts that get the constitution, chosen by record; the others get no context (COPSD: 0.85)."""
    constitution_benign: Literal["default", "none"] = "default"
    """What benign prompts get from the constitution: its general text, or nothing."""
    steering: str = ""
    """direction.safetensors of `python -m opsa_jax.steer`: the teacher is steered along it (SafeSteer)."""
    steering_coefficient: float = 1.0
    """Factor of the direction."""


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
    """Field with a given response (for rollout.writer=file; the chosen one of a preference pair)."""
    rejected_field: str = "rejected"
    """Field with the rejected response of a preference pair (for objective.loss=dpo)."""
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
    """Who writes the responses that are trained on, and how they are sampled."""

    writer: Literal["student", "teacher", "file"] = "student"
    """student: on-policy; teacher: sampled from the teacher, with its context and steering; file: the response field of the records."""
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
    micro_batch: int = 0
    """Responses that are sampled at a time; 0 is the whole rollout batch. Fewer need less memory for keys and values, and are the same."""


@dataclass(frozen=True)
class WeightConfig:
    """Which tokens count, and how much. Statistics are those of the student that wrote the responses, without a gradient."""

    kind: Literal["uniform", "window", "fire", "tip", "entropy"] = "uniform"
    """uniform; window: the first tokens, with decay; fire: confident teacher and unsure student weigh more (FiRe-OPD); tip and
    entropy: only the share `keep` of tokens, by student entropy and divergence together (TIP) or by student entropy (REOPOLD)."""
    first: int = 32
    """window: tokens at the start of a response that count."""
    decay: float = 1.0
    """window: factor per token."""
    teacher_confidence: float = 1.0
    """fire: a of (1 + a * confidence of the teacher)(1 + b * entropy of the student)."""
    student_entropy: float = 1.0
    """fire: b."""
    keep: float = 0.5
    """tip, entropy: share of the tokens kept."""
    after: float = 0.0
    """Share of the updates after which the weights apply; uniform before (REOPOLD's second phase)."""


@dataclass(frozen=True)
class FilterConfig:
    """Which responses count."""

    kind: Literal["none", "teacher_logp"] = "none"
    """teacher_logp drops the responses least likely under the teacher, over the global rollout batch (FiRe-OPD)."""
    quantile: float = 0.2
    """teacher_logp: responses below this quantile are dropped."""


@dataclass(frozen=True)
class PolicyConfig:
    """Policy gradient on the sampled tokens, with objective.loss=policy."""

    advantage: Literal["teacher", "return", "token", "outcome", "exopd", "floor"] = "teacher"
    """teacher: log q - log p_old (FiRe-OPD); return: its return-to-go, normalised per prompt and step (COPSD, paper); token: clamped,
    normalised per prompt (COPSD, released code); outcome: the latter times an outcome reward (COPSD, hybrid); exopd; floor (REOPOLD)."""
    clip: float = 0.2
    """Clips the ratio p / p_old to 1 -+ this (PPO); 0 does not."""
    gamma: float = 1.0
    """return: discount per token."""
    reference_kl: float = 0.0
    """Factor of the KL to the initial student (k3 estimate at the sampled tokens)."""
    reward: str = "refusal"
    """outcome: refusal (+1 for a refused harmful or an answered benign prompt, otherwise -1), or FILE.py:FUNCTION(record, response)."""
    outcome_mix: float = 0.3
    """outcome: share of the token part."""
    exopd_lambda: float = 1.25
    """exopd: weight of the teacher's gain over the reference."""
    floor_lambda: float = 0.2
    """floor: rewards are at least log(lambda / (1 - lambda))."""
    divergence: float = 0.0
    """Also add this times the divergence of the objective, on the tokens that its entropy floor leaves (EOPD)."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised at every response token, and how it is summed."""

    loss: Literal["divergence", "policy", "nll", "dpo"] = "divergence"
    """divergence between student and teacher; policy gradient on sampled tokens; nll of the responses (SFT); dpo on pairs."""
    divergence: Literal["forward", "reverse", "mix", "jsd"] = "mix"
    """forward = KL(teacher, student), reverse = KL(student, teacher), mix = a*forward + (1-a)*reverse, jsd = JSD(b)."""
    mix: float = 0.5
    """a of mix (OPSA, arXiv 2605.15239, App. F: 0.5)."""
    beta: float = 0.5
    """b of jsd: the mixture distribution is b*teacher + (1-b)*student."""
    support: Literal["full", "teacher_topk", "student_topk", "tokens"] = "full"
    """Tokens the divergence is summed over: the whole vocabulary, the top k of teacher or student, or the fixed set in `tokens`."""
    subset: Literal["raw", "generalised", "renormalise", "tail"] = "renormalise"
    """On part of the vocabulary: the raw sum, that sum made least at equality, both sides renormalised, or a bucket for the rest."""
    k: int = 512
    """k of the top-k supports."""
    tokens: str = ""
    """tokens.json of `python -m opsa_jax.steer`, for support=tokens (SafeSteer)."""
    temperature: float = 1.0
    """Divides the logits of both sides in the loss (not the sampling temperature)."""
    entropy_floor: float = 0.0
    """The divergence counts only where the teacher's entropy is at least this, in nats (EOPD: 0.8); 0 is everywhere."""
    reduction: Literal["token_mean", "sequence_mean"] = "token_mean"
    """Mean over all response tokens of the update batch, or mean over sequences of their token means."""
    weights: WeightConfig = field(default_factory=WeightConfig)
    """Which tokens count, and how much."""
    filter: FilterConfig = field(default_factory=FilterConfig)
    """Which responses count."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """Policy gradient, with loss=policy."""
    dpo_beta: float = 0.1
    """beta of loss=dpo."""
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
    checkpoints: str = ""
    """Where checkpoints go: a folder (that all processes see), gs://BUCKET/FOLDER or s3://BUCKET/FOLDER; empty is OUT/checkpoints."""


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
class DistributedConfig:
    """Several processes that run one program (multi-controller JAX). On a TPU pod slice, a GKE JobSet or under srun, start the same
    command everywhere and leave these alone; elsewhere give all of coordinator, processes and process_id."""

    coordinator: str = ""
    """HOST:PORT of process 0, as the others reach it."""
    processes: int = 0
    """Number of processes."""
    process_id: int = -1
    """Number of this process, 0 to processes - 1."""
    local_devices: tuple[int, ...] = ()
    """Devices of this machine that this process uses; empty is all (under srun: one each)."""
    detect: Literal["auto", "off"] = "auto"
    """auto: ask the cluster for what is not given; off: a single process, unless all three are given."""
    timeout: int = 300
    """Seconds that a process waits for the others to start, and to end."""
    heartbeat: int = 60
    """Seconds without a sign of life after which a process counts as dead, and the others end."""


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
    """What is scored, separated by commas: sandbox, groups (safety, overrefusal, capability, attacks), benchmarks (NAME, NAME:SUBSET,
    NAME=FILE; `python -m opsa_jax.evaluate --list`), JSONL files in the format of evals/suite.py; or empty for none."""
    max_new_tokens: int = 64
    """Room for the response; 0 is the benchmark's own (64 for the sandbox)."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with this much probability."""
    samples: int = 1
    """Responses per prompt; rates are means over them, and with several also any of them (any@n, pass@n)."""
    data_dir: str = ""
    """Folder with the benchmarks' files; empty takes the hub."""
    refusal_phrases: str = "sandbox-v1"
    """List of refusal phrases that decides what is a refusal: sandbox-v1, english-v1 (evaluate also: auto)."""
    batch: int = 256
    """Prompts sampled at a time."""
    limit: int = 0
    """Prompts per metric; 0 is all."""


@dataclass(frozen=True)
class ValidationConfig:
    """Evaluation while training, on the validation split of a suite (never what is reported), and the checkpoint that is kept."""

    every: int = 0
    """Updates between evaluations (and one at the end); 0 is never. Rounded up to whole rollout batches."""
    suite: str = "sandbox"
    """sandbox, or a JSONL file in the format of evals/suite.py with records of split=val."""
    limit: int = 16
    """Prompts per metric."""
    keep_best: bool = False
    """Export and report the best checkpoint instead of the last: the lowest mean ASR among those within both limits."""
    max_over_refusal: float = 0.05
    """Limit: over-refusal at most this much above the base's."""
    max_capability_loss: float = 0.05
    """Limit: capability at most this much below the base's."""


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
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    log: LogConfig = field(default_factory=LogConfig)
    evals: EvalConfig = field(default_factory=EvalConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
