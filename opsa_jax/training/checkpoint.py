"""Asynchronous checkpoints of the whole run: state, place in the data, and the identity of everything frozen."""

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from opsa_jax.errors import UserError
from opsa_jax.training.state import TrainState

logging.getLogger("absl").setLevel(logging.ERROR)


class Checkpoints:
    """Checkpoints of one run directory. Orbax writes each under a temporary name and renames it, so a kill leaves only whole ones."""

    def __init__(self, folder: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    @property
    def latest(self) -> int | None:
        """Updates done at the newest checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, place: dict[str, Any]) -> None:
        """Start saving; returns once the arrays are copied off the devices.

        Args:
            step: updates done.
            place: what else is needed to go on: the data iterator's state and the identities of teacher and contexts (JSON types).
        """
        if step != self.latest:
            self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), place=ocp.args.JsonSave(place)))

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint, onto the shardings of `state`.

        Raises:
            UserError: the checkpoint does not fit this model.
        """
        if self.latest is None:
            raise UserError(f"{self._manager.directory} holds no checkpoint yet; let the run save one (--train.save-every)")
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like), place=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(self.latest, args=args)
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"checkpoint {self.latest} in {self._manager.directory} does not fit this run: {str(e)[:200]}") from None
        return restored.state, restored.place

    def close(self) -> None:
        """Wait for saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()
