"""`python -m opsa_jax.sandbox`: rebuild the embedded world (data files, tokenizer, pretrained base), or check one.

    python -m opsa_jax.sandbox --out DIR             writes DIR/data and DIR/base, then checks it
    python -m opsa_jax.sandbox --check               scores the shipped base; --out DIR scores another
"""

import dataclasses
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opsa_jax.cli import entry, parse
from opsa_jax.errors import UserError


@dataclass(frozen=True)
class Args:
    """Rebuild or check the embedded world."""

    out: str = ""
    """Folder with base/ and data/; empty for the one shipped with the package."""
    seed: int = 2
    """Seed of the model: initial weights and order of the pretraining data. The world itself never changes."""
    steps: int = 450
    """Pretraining steps, about half a second each on two free cores."""
    dtype: str = "float32"
    """Dtype of the stored weights: float32 or bfloat16."""
    check: bool = False
    """Only score the existing base."""


def main(argv: list[str] | None = None) -> int:
    args = parse(Args, None, sys.argv[1:] if argv is None else argv, "opsa_jax.sandbox", __doc__)
    root = Path(args.out) if args.out else Path(__file__).parent
    if not args.check:
        build(root, args)
    return report(root)


def build(root: Path, args: Args) -> None:
    """Write root/data and root/base.

    Raises:
        UserError: root/base exists.
    """
    from opsa_jax.models.config import to_hf
    from opsa_jax.models.hf import save_params
    from opsa_jax.sandbox import files
    from opsa_jax.sandbox.pretrain import pretrain

    if (root / "base").exists():
        raise UserError(f"{root / 'base'} exists; remove it first, or give another --out")
    files.write(root / "data")
    tokenizer = world_tokenizer()
    params, cfg = pretrain(tokenizer, args.seed, args.steps)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = to_hf(dataclasses.replace(cfg, scan_unroll=1)) | ids | {"bos_token_id": None, "max_position_embeddings": 4096}
    save_params(params, cfg, root / "base", args.dtype, raw_config=config)
    save_tokenizer(tokenizer, root / "base")
    generation = {"do_sample": True, "temperature": 1.0, **ids}
    (root / "base" / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def world_tokenizer():
    """The tokenizer of the world: its vocabulary is collected from a fixed sample of the pretraining text and all shipped prompts."""
    from opsa_jax.sandbox import files
    from opsa_jax.sandbox.corpus import examples
    from opsa_jax.sandbox.tokenizer import build_tokenizer
    from opsa_jax.sandbox.world import WORLD_SEED

    sample = itertools.islice(examples(np.random.default_rng(WORLD_SEED)), 20_000)
    texts = [part for e in sample for part in (e.system, e.user, e.forced, e.response)]
    return build_tokenizer([*texts, *(row["prompt"] for row in files.eval_records()), *(row["text"] for row in files.context_records())])


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Tokenizer files that transformers 4 and 5 load: the class is named as both know it."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": tokenizer.chat_template}
    config = {k: v for k, v in json.loads(file.read_text()).items() if k != "backend"} | config
    file.write_text(json.dumps(config, indent=2) + "\n")


def report(root: Path) -> int:
    """Print the table.

    Raises:
        UserError: the base fails a gate.
    """
    from opsa_jax.config import MeshConfig
    from opsa_jax.data.chat import Chat
    from opsa_jax.models.hf import load_config, load_params
    from opsa_jax.parallel.mesh import make_mesh
    from opsa_jax.sandbox.check import table

    folder = root / "base"
    cfg, _ = load_config(str(folder))
    params = load_params(folder, cfg, "float32", make_mesh(MeshConfig()))
    text, failed = table(params, cfg, Chat.load(str(folder)), root / "data")
    print(text)
    if failed:
        raise UserError(f"{folder}: {'; '.join(failed)}; train longer (--steps) or with another --seed")
    return 0


if __name__ == "__main__":
    raise SystemExit(entry(main))
