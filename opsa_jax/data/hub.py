"""Data files of a Hugging Face dataset for one split, read by our own readers: no `datasets` dependency, no dataset scripts."""

import fnmatch
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opsa_jax.data.tables import READERS, suffix_of
from opsa_jax.errors import UserError

_SPLITS = ("train", "validation", "valid", "val", "dev", "test", "eval")


def split_files(name: str, split: str) -> list[Path]:
    """Local paths of the files of `name` that hold `split`, downloaded when they are not in the cache yet.

    `name` is `org/name`, `org/name:config` for a dataset with several configurations, or a local folder laid out like one.

    Raises:
        UserError: no such dataset, gated, offline and not cached, unknown configuration, no readable file for the split.
    """
    name, _, config = name.partition(":")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return [folder / n for n in _choose(name, _listing(folder), _card(folder / "README.md"), split, config)]
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        try:
            names = HfApi().list_repo_files(name, repo_type="dataset")
        except (GatedRepoError, HFValidationError, RepositoryNotFoundError):
            raise
        except Exception:  # offline by choice, by accident, or the hub is down: whatever an earlier run left in the cache
            folder = _cached(name)
            return [folder / n for n in _choose(name, _listing(folder), _card(folder / "README.md"), split, config)]
        card = {}
        if "README.md" in names:
            card = _card(Path(snapshot_download(name, repo_type="dataset", allow_patterns=["README.md"])) / "README.md")
        chosen = _choose(name, names, card, split, config)
        folder = Path(snapshot_download(name, repo_type="dataset", allow_patterns=chosen))
        return [folder / n for n in chosen]
    except GatedRepoError:
        raise UserError(f"hf:{name} is gated: accept its terms on its hub page, then log in with `hf auth login` or HF_TOKEN") from None
    except HFValidationError:
        raise UserError(f"hf:{name}: neither a local folder nor a hub name; write hf:org/name, or the path of a folder") from None
    except RepositoryNotFoundError:
        raise UserError(f"hf:{name}: no such dataset, or a private one; check the name, or log in with `hf auth login`") from None
    except LocalEntryNotFoundError:
        raise UserError(f"hf:{name} is not in the cache and the hub cannot be reached; download it first, or give a local folder") from None


def _cached(name: str) -> Path:
    """Folder with the files of earlier downloads. Raises LocalEntryNotFoundError where there are none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, repo_type="dataset", local_files_only=True))
    except LocalEntryNotFoundError as e:
        # Earlier downloads took only the files of their split, so newer hub clients call the snapshot incomplete.
        if path := getattr(e, "snapshot_path", None):
            return Path(path)
        raise


def _listing(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _card(readme: Path) -> Mapping[str, Any]:
    """The YAML block at the top of a dataset card."""
    from huggingface_hub import metadata_load

    return (metadata_load(readme) if readme.is_file() else None) or {}


def _choose(name: str, names: Sequence[str], card: Mapping[str, Any], split: str, config: str) -> list[str]:
    """The files of `split`: as the card declares them, otherwise by the split's name in file and folder names."""
    data = sorted(n for n in names if suffix_of(n))
    declared = [c for c in card.get("configs") or [] if c.get("data_files")]
    if declared:
        patterns = _declared_patterns(name, declared, config)
        if split not in patterns:
            raise UserError(f"hf:{name} has no split {split!r}; allowed: {', '.join(patterns)}")
        found = [n for n in data if any(fnmatch.fnmatch(n, p) for p in patterns[split])]
    else:
        data = [n for n in data if not config or config in Path(n).parts]
        found = [n for n in data if _mentions(n, split)]
        if not found and split == "train" and not any(_mentions(n, s) for n in data for s in _SPLITS):
            found = data  # no file names any split: the set is one, and it is called train
    if not found:
        raise UserError(f"hf:{name} has no readable file for split {split!r}; its data files: {', '.join(data[:8]) or 'none'}")
    kind = next(s for s in READERS if any(suffix_of(n) == s for n in found))
    return [n for n in found if suffix_of(n) == kind]


def _declared_patterns(name: str, declared: Sequence[Mapping[str, Any]], config: str) -> dict[str, list[str]]:
    """Split -> file patterns of one configuration of a card."""
    known = [c["config_name"] for c in declared]
    if config and config not in known:
        raise UserError(f"hf:{name} has no configuration {config!r}; allowed: {', '.join(known)}")
    default = [c for c in declared if c.get("default") or c["config_name"] == "default"] or declared
    if not config and len(default) > 1:
        raise UserError(f"hf:{name} has several configurations ({', '.join(known)}); write hf:{name}:{known[0]}, for example")
    files = next(c for c in declared if c["config_name"] == config)["data_files"] if config else default[0]["data_files"]
    if isinstance(files, str) or isinstance(files[0], str):
        files = [{"split": "train", "path": files}]
    return {f["split"]: [f["path"]] if isinstance(f["path"], str) else list(f["path"]) for f in files}


def _mentions(name: str, split: str) -> bool:
    """`data/train-00000-of-00002.parquet` and `train/0.parquet` mention train; `training_notes.csv` does not."""
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(split)}(?![A-Za-z0-9])", name) is not None
