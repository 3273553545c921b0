"""Where metrics go: metrics.jsonl always, TensorBoard and Weights & Biases when asked."""

import json
from pathlib import Path
from typing import Any

from opsa_jax.config import LogConfig
from opsa_jax.errors import UserError


def ratios(pairs: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Means of (sum, weight) pairs; a metric of no weight is left out.

    >>> ratios({"loss": (6.0, 3.0), "kl_harmful": (0.0, 0.0)})
    {'loss': 2.0}
    """
    return {name: float(total) / float(weight) for name, (total, weight) in pairs.items() if weight}


class MetricWriter:
    """Appends one row per update to `metrics.jsonl`, flushed at once, so a kill loses no finished row.

    Resuming drops the rows after the checkpoint, so the file reads like that of an uninterrupted run.
    """

    def __init__(self, folder: Path, cfg: LogConfig, run_config: dict[str, Any], start: int):
        path = folder / "metrics.jsonl"
        kept = []
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= start]
        path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a")
        self._tensorboard = _tensorboard(folder) if cfg.tensorboard else None
        self._wandb = _wandb(folder, cfg, run_config) if cfg.wandb else None

    def write(self, step: int, row: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        if self._tensorboard:
            for name, value in row.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(row, step=step)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def check_extras(cfg: LogConfig) -> None:
    """Missing extras are told before anything is loaded.

    Raises:
        UserError: TensorBoard or W&B asked for and not installed.
    """
    from importlib.util import find_spec

    for wanted, module, extra in ((cfg.tensorboard, "tensorboard", "tensorboard"), (bool(cfg.wandb), "wandb", "wandb")):
        if wanted and find_spec(module) is None:
            raise UserError(f"--log.{extra} needs the package {module}; install it with: pip install 'opsa_jax[{extra}]'")


class _EventFile:
    """Scalars in TensorBoard's format through the tensorboard package alone (no TensorFlow, no torch)."""

    def __init__(self, folder: Path):
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(folder / "tensorboard"))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        import time

        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self._writer.close()


def _tensorboard(folder: Path) -> _EventFile:
    return _EventFile(folder)


def _wandb(folder: Path, cfg: LogConfig, run_config: dict[str, Any]):
    import wandb

    return wandb.init(project=cfg.wandb, dir=str(folder), name=folder.name, config=run_config, resume="allow", id=folder.name)
