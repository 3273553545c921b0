"""Checkpoints in Hugging Face format: find, read, write. Weights come from safetensors only; no pickle, no remote code."""

import functools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import errors as hub_errors
from jax.sharding import Mesh

from opsa_jax import paths
from opsa_jax.errors import UserError
from opsa_jax.models.config import EXECUTION, DecoderConfig, from_hf, to_hf
from opsa_jax.models.params import Params, declare
from opsa_jax.models.tensors import IGNORED, Stored, load_tree, new_folder, save_tree, scan

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("tokenizer.model", "chat_template.jinja", "chat_template.json"),
)
# Second copies of the weights that some repositories carry.
_DUPLICATES = ("consolidated*", "original/*", "onnx/*", "*/*.safetensors")


def fetch(path: str, revision: str = "main") -> Path:
    """The local folder of a checkpoint: `path` itself, `sandbox:base`, or a hub repository `org/name`, downloaded once.

    Raises:
        UserError: neither a folder nor a repository that can be read.
    """
    return _local(path) or _download(path, revision, ("*.safetensors", "*.json", *TOKENIZER_FILES))


def load_config(path: str, revision: str = "main") -> tuple[DecoderConfig, dict[str, Any]]:
    """Architecture of a checkpoint and its raw `config.json`; of a hub repository nothing else is downloaded.

    Raises:
        UserError: no such checkpoint, no `config.json`, or one that `from_hf` refuses.
    """
    file = (_local(path) or _download(path, revision, ("config.json",))) / "config.json"
    if not file.is_file():
        raise UserError(f"{file.parent} has no config.json; a checkpoint is a folder with config.json and {WEIGHTS}")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{file} is not JSON: {e}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{file} is not a JSON object")
    return from_hf(raw, where=str(file)), raw


def _local(path: str) -> Path | None:
    folder = paths.resolve(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{path} is a file; give the checkpoint's folder (with config.json and {WEIGHTS})")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
        raise UserError(f"no folder {path!r}, and it is not a hub name (org/name)")
    return None


def _download(name: str, revision: str, files: tuple[str, ...]) -> Path:
    why = f"{name!r} is no local folder, and as a hub name (revision {revision!r})"
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=files, ignore_patterns=list(_DUPLICATES)))
    except hub_errors.GatedRepoError:
        raise UserError(f"{why} it is gated: accept its terms on its page, then run `hf auth login`") from None
    except hub_errors.RepositoryNotFoundError:
        raise UserError(f"{why} it does not exist or is private: check the spelling, or run `hf auth login`") from None
    except hub_errors.RevisionNotFoundError:
        raise UserError(f"{why} it has no such branch, tag or commit") from None
    except hub_errors.LocalEntryNotFoundError:
        raise UserError(f"{why} it is not in the local cache and the hub cannot be reached; go online once or give a folder") from None
    except (hub_errors.HFValidationError, OSError) as e:
        raise UserError(f"{why} it could not be downloaded: {e}") from None


def open_weights(folder: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint folder by key, not yet read: of `model.safetensors`, or of the shards its index names.

    Raises:
        UserError: no safetensors weights (pickle files are never opened), a missing or damaged file, or an index that does not match.
    """
    if (folder / WEIGHTS).is_file():
        return scan([folder / WEIGHTS])
    if not (folder / INDEX).is_file():
        others = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".safetensors"))
        hint = f" (it has {', '.join(others[:3])}; pickle files are never opened: convert to safetensors)" if others else ""
        raise UserError(f"{folder} has no {WEIGHTS} or {INDEX}{hint}")
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        weight_map = {key: name for key, name in weight_map.items() if not key.endswith(IGNORED)}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{folder / INDEX} is damaged ({type(e).__name__}: {e}); copy or download it again") from None
    stored = scan([folder / name for name in sorted(set(weight_map.values()))])
    for key in sorted(stored.keys() | weight_map.keys()):
        has, says = stored[key].file.name if key in stored else None, weight_map.get(key)
        if has != says:
            raise UserError(f"{folder / INDEX}: tensor {key} should be in {says} and is in {has}; copy or download the checkpoint again")
    return stored


def checkpoint_dtype(folder: Path) -> str:
    """float32, bfloat16 or float16: the dtype that holds all weights of a checkpoint (float64 counts as float32, the most we keep)."""
    dtypes = {stored.dtype for stored in open_weights(folder).values()}
    return "float32" if "float64" in dtypes else str(functools.reduce(jnp.promote_types, dtypes))


def load_params(folder: Path, cfg: DecoderConfig, dtype: str, mesh: Mesh) -> Params:
    """The weights of a checkpoint folder as `dtype`, sharded over the mesh; see `tensors.load_tree` for memory and errors.

    Tied checkpoints may repeat the embedding as `lm_head.weight`.

    Raises:
        UserError: files, keys or shapes that do not match `cfg`, or a head that differs from the embedding it is tied to.
    """
    stored, declared = open_weights(folder), declare(cfg)
    embed, head = stored.get("model.embed_tokens.weight"), stored.get("lm_head.weight")
    if cfg.tie_embeddings and head is not None and embed is not None:
        if not np.array_equal(head.read(), embed.read()):
            raise UserError(f"{head.file}: lm_head.weight differs from model.embed_tokens.weight, but config.json says tie_word_embeddings")
        del stored["lm_head.weight"]
    return load_tree(stored, declared, dtype, mesh, folder)


def save_params(
    params: Params,
    cfg: DecoderConfig,
    folder: Path,
    dtype: str,
    raw_config: dict[str, Any] | None = None,
    tokenizer_from: Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a checkpoint folder that transformers and vLLM load: weights, config.json and, from a source folder, the tokenizer.

    The folder appears when everything in it is written. All processes call it; the first one writes.

    Args:
        params: the weights, without adapters (`lora.merge`).
        cfg: their architecture.
        folder: destination; must not exist.
        dtype: of the stored weights.
        raw_config: config.json of the source, kept but for the dtype; written from `cfg` when None.
        tokenizer_from: folder whose tokenizer, chat template and generation_config.json are copied.
        max_shard_bytes: see `tensors.save_tree`.

    Raises:
        UserError: the folder exists.
    """
    if params.layers.lora is not None:
        raise ValueError("save_params writes plain weights: merge the adapters first (lora.merge)")
    config = to_hf(cfg) if raw_config is None else _checked(raw_config, cfg)
    for name in [n for n in ("torch_dtype", "dtype") if n in config] or ["torch_dtype"]:
        config[name] = dtype
    with new_folder(folder) as partial:
        save_tree(declare(cfg), params, partial, dtype, max_shard_bytes=max_shard_bytes)
        if jax.process_index() == 0:
            (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for name in ("generation_config.json", *TOKENIZER_FILES) if tokenizer_from else ():
                if (tokenizer_from / name).is_file():
                    shutil.copyfile(tokenizer_from / name, partial / name)


def _checked(raw_config: dict[str, Any], cfg: DecoderConfig) -> dict[str, Any]:
    """A copy of the source's config.json, without pointers to code that is not copied."""
    source = from_hf(raw_config)
    if replace(source, **{name: getattr(cfg, name) for name in EXECUTION}) != cfg:
        raise ValueError(f"raw_config describes another architecture: {source} instead of {cfg}")
    return {name: value for name, value in raw_config.items() if name != "auto_map"}
