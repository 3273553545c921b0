"""Where things are: files shipped with the package are written `sandbox:NAME`, everything else is a path of the user's."""

from importlib import resources
from pathlib import Path

from opsa_jax.errors import UserError, did_you_mean


def resolve(path: str) -> Path:
    """`sandbox:base` or `sandbox:train.jsonl` -> the embedded model folder or data file; other paths unchanged.

    Raises:
        UserError: no such embedded file.
    """
    scheme, _, name = path.partition(":")
    if scheme != "sandbox":
        return Path(path)
    root = Path(str(resources.files("opsa_jax.sandbox")))
    if name == "base":
        return root / "base"
    found = root / "data" / name
    if not found.is_file():
        raise UserError(f"no embedded file {path!r}{did_you_mean(name, ['base', *(p.name for p in (root / 'data').glob('*'))])}")
    return found
