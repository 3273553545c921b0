"""Asynchronous checkpoints of the whole run: state, place in the data, and the identity of everything frozen."""

import logging
import threading
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from opsa_jax.config import RunConfig
from opsa_jax.errors import UserError
from opsa_jax.parallel import distributed
from opsa_jax.training.mirror import Mirror
from opsa_jax.training.state import TrainState

logging.getLogger("absl").setLevel(logging.ERROR)


_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}  # extras gcs and s3
_PATIENCE = 60  # seconds that an object store may take to answer


def place_of(config: RunConfig) -> str:
    """Where a run's checkpoints are: an absolute folder or an object-store address.

    Raises:
        UserError: an address of another kind.
    """
    where = config.train.checkpoints
    scheme, separator, rest = where.partition("://")
    if not separator:
        return str((Path(where) if where else Path(config.out) / "checkpoints").absolute())
    if scheme not in _PACKAGES or not rest.strip("/"):
        raise UserError(f"--train.checkpoints {where}: must be a folder, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER")
    return where.rstrip("/")


def check_place(config: RunConfig, resuming: bool) -> None:
    """Before anything is loaded: checkpoints can be written where the config says, and no other run's are there.

    Raises:
        UserError: missing package, no permission, no answer, or a place that is taken.
    """
    if not config.train.checkpoints:
        return
    where, found = place_of(config), []
    # In a thread: without a network or credentials, the clients of object stores retry for many minutes.
    thread = threading.Thread(target=lambda: found.append(_probe(where)), daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    error, taken = found[0] if found else (f"no answer within {_PATIENCE} s; check the network and the address", False)
    if error:
        raise UserError(f"--train.checkpoints {where} cannot be written: {error}")
    if taken and not resuming:
        raise UserError(f"--train.checkpoints {where} holds the checkpoints of another run; choose another place, or --resume that run")


def _probe(where: str) -> tuple[str, bool]:
    """(What keeps us from writing there, whether checkpoints are there)."""
    try:
        folder = epath.Path(where)
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write"
        probe.write_text("")
        probe.unlink()
        return "", any(p.name.isdigit() for p in folder.iterdir())
    except ImportError:
        package = _PACKAGES.get(where.partition("://")[0], "fsspec")
        return f"it needs the package {package}; install it with: pip install {package}", False
    except Exception as e:  # each store's client has its own
        reason = " ".join((getattr(e, "strerror", None) or str(e)).split())[:200]
        return f"{type(e).__name__}: {reason}; check permission, credentials and address", False


class Checkpoints:
    """Checkpoints of one run. Orbax writes each under a temporary name and renames it (on an object store: marks it when it is
    complete), so a kill leaves only whole ones. With several processes all make the same calls, and each writes its own shards.
    """

    def __init__(self, place: str | Path, keep: int, staging: str | Path | None = None):
        """
        Args:
            place: a folder, or gs://BUCKET/FOLDER, which Orbax writes to; or s3://BUCKET/FOLDER, which it does not: checkpoints are
                then staged in a folder and copied (mirror.py).
            keep: how many to keep.
            staging: that folder.
        """
        self._mirror, self._copied = None, str(place).startswith("s3://")
        if self._copied:
            folder = Path(staging).absolute()
            if jax.process_index() == 0:
                folder.mkdir(parents=True, exist_ok=True)
                self._mirror = Mirror(folder, str(place))
            distributed.from_first("fetched", lambda: self._mirror.fetch())
            place = folder
        elif "://" not in str(place):
            place = Path(place).absolute()  # what Orbax asks for
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(epath.Path(place), options=options)

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
        if step == self.latest:
            return
        if self._mirror:
            self._mirror.wait()
        self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), place=ocp.args.JsonSave(place)))
        if self._mirror:
            self._mirror.send(step, self._manager.wait_until_finished)

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
            why = " ".join(str(e).split())[:200]
            raise UserError(f"checkpoint {self.latest} in {self._manager.directory} does not fit this run: {why}") from None
        return restored.state, restored.place

    def drop_after(self, step: int) -> None:
        """Delete checkpoints of more than `step` updates."""
        for later in [s for s in self._manager.all_steps() if s > step]:
            self._manager.delete(later)

    def close(self) -> None:
        """Wait for saves under way."""
        self._manager.wait_until_finished()
        if self._copied:  # the other processes wait as well
            distributed.from_first(f"copied {self.latest}", lambda: self._mirror.wait())
        self._manager.close()
