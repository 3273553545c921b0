"""The run directory: made once, continued only by the same run."""

import json
from pathlib import Path
from typing import Any

from opsa_jax.config import RunConfig
from opsa_jax.errors import UserError
from opsa_jax.recipes import from_dict, provenance, to_dict

# What may differ between the parts of a resumed run, since it does not change what is computed.
_FREE = ("out", "resume", "log", "evals", "export", "mesh", "distributed", "train.save_every", "train.keep", "train.checkpoints")


def check(config: RunConfig) -> bool:
    """True if the run directory holds a run to continue, False if it is to be made. Nothing is written.

    Raises:
        UserError: it exists and --resume is not given, it holds another run, or it cannot be written.
    """
    folder = Path(config.out)
    saved = folder / "config.json"
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        _check_writable(folder)
        return False
    if not config.resume:
        raise UserError(f"run directory {folder} exists; continue it with --resume, or choose another with --out")
    if not saved.is_file():
        raise UserError(f"run directory {folder} has no config.json, so there is no run to resume; choose another with --out")
    before, now = (_flat(d) for d in (json.loads(saved.read_text())["config"], to_dict(config)))
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name) and not name.startswith(_FREE):
            raise UserError(
                f"--resume: {folder} was run with {name}={before.get(name)!r}, now {now.get(name)!r}; "
                "use the same value, or start anew with --out"
            )
    return True


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write"
        probe.touch()
        probe.unlink()
        folder.rmdir()
    except OSError as e:
        raise UserError(f"run directory {folder} cannot be written: {e.strerror}; choose another with --out") from None


def create(config: RunConfig) -> Path:
    """Make the directory and save the resolved config with its hash, versions and command line."""
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", provenance(config))
    return folder


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Atomically, through a temporary file beside it; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def saved_config(folder: Path) -> RunConfig:
    """The config of a run directory.

    Raises:
        UserError: no run there, or one of another version.
    """
    try:
        return from_dict(json.loads((folder / "config.json").read_text())["config"])
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"{folder} is not a run directory: config.json: {e}") from None


def _flat(d: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in d.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
