"""Runs the tagged cells of a notebook as one plain Python script, without Jupyter: `!`, `%cd` and `%pip` lines become subprocesses."""

import json
import re
import subprocess
import sys
from pathlib import Path

HEAD = """
import subprocess, sys, types

def _shell(command):
    sys.stdout.flush()
    if (code := subprocess.run(command, shell=True).returncode) != 0:
        raise SystemExit(f"exit code {code}: {command}")

class Image:
    def __init__(self, path):
        self.size = len(open(path, "rb").read())

display = types.ModuleType("IPython.display")
display.Image, display.display = Image, lambda image: print(f"image of {image.size} bytes")
sys.modules |= {"IPython": types.ModuleType("IPython"), "IPython.display": display}
"""


def cells(path: Path, *tags: str) -> list[str]:
    """Sources of the code cells with one of the tags."""
    found = json.loads(path.read_text())["cells"]
    return ["".join(c["source"]) for c in found if c["cell_type"] == "code" and set(tags) & set(c["metadata"]["tags"])]


def script(sources: list[str]) -> str:
    """One script of the cells.

    >>> print(script(["if x:\\n    !echo {x}\\n%cd folder"]).removeprefix(HEAD))
    if x:
        _shell(f'echo {x}')
    __import__("os").chdir(f'folder')
    """
    text = "\n\n".join(sources)
    text = re.sub(r"^(\s*)!(.*)$", lambda m: f"{m[1]}_shell(f{m[2]!r})", text, flags=re.M)
    text = re.sub(r"^(\s*)%cd (.*)$", lambda m: f'{m[1]}__import__("os").chdir(f{m[2]!r})', text, flags=re.M)
    text = re.sub(r"^(\s*)%pip (.*)$", lambda m: f"{m[1]}_shell(f{sys.executable + ' -m pip ' + m[2]!r})", text, flags=re.M)
    return HEAD + text


def run(path: Path, *tags: str, **options) -> subprocess.CompletedProcess:
    """The cells with these tags, in one process. `options` are those of subprocess.run."""
    code = script(cells(path, *tags))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, errors="replace", **options)
