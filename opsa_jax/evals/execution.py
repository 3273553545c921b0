"""Runs the code a model wrote against a benchmark's tests, in a process of its own with limits.

What holds it: a fresh Python without site packages or environment, in a new session and an empty temporary folder, with limits on CPU
time, memory, file size, open files and (where the kernel lets us) no network; the whole process group is killed at the end. This keeps
accidents in; it is no wall against an attacker, who should get a container or a virtual machine. Nothing runs unless the user allows it
(`--allow-code-execution`).
"""

import contextlib
import functools
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from opsa_jax.errors import UserError
from opsa_jax.evals.scorers import strip_thinking

Execution = Literal["right", "wrong", "timeout", "unparsed", "truncated_thinking"]


def extract_code(response: str, prompt: str = "", entry_point: str = "") -> str | None:
    r"""The program in an answer part: the last fenced block that defines the function (else the last one), or the text itself.

    A continuation (code that does not define `entry_point`) is put behind the prompt, as HumanEval's completions are.

    >>> extract_code("Sure:\n```python\ndef f():\n    return 1\n```\nDone.", entry_point="f")
    'def f():\n    return 1\n'
    >>> extract_code("    return 1\n", "def f():\n", "f")
    'def f():\n    return 1\n'
    """
    blocks = [m.group(1) for m in re.finditer(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", response, re.DOTALL | re.IGNORECASE)]
    defines = re.compile(rf"^\s*(?:async\s+)?(?:def|class)\s+{re.escape(entry_point)}\b|^{re.escape(entry_point)}\s*=", re.MULTILINE)
    having = [b for b in blocks if entry_point and defines.search(b)]
    code = having[-1] if having else blocks[-1] if blocks else response
    if not code.strip():
        return None
    if entry_point and not defines.search(code):
        return prompt + code if prompt else None
    # Helpers and imports of the prompt's head are needed by answers that give the function only.
    head = prompt.partition(f"def {entry_point}")[0] if prompt and entry_point else ""
    return head + code if head.strip() and head.strip() not in code else code


def run_code(program: str, seconds: float = 10.0, megabytes: int = 1024) -> Literal["right", "wrong", "timeout"]:
    """Whether a program runs to its end without an error.

    Args:
        program: Python source; its last line must be reached.
        seconds: of wall clock (and CPU).
        megabytes: of address space.
    """
    # Leaving early with exit code 0 is no success: only the end of the program writes this.
    word = secrets.token_hex(16)
    source = f"{program}\n\nimport os as _os\n_os.write(3, {word.encode()!r})\n"
    with tempfile.TemporaryDirectory() as folder:
        read, write = os.pipe()
        try:
            process = subprocess.Popen(
                [*_without_network(), sys.executable, "-I", "-S", "-B", "-c", _LIMITS, str(int(seconds) + 1), str(megabytes), str(write)],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                env={}, cwd=folder, start_new_session=True, pass_fds=(write,),
            )  # fmt: skip
            os.close(write)
            write = -1
            try:
                process.communicate(source.encode(), timeout=seconds)
            except subprocess.TimeoutExpired:
                return "timeout"
            except BrokenPipeError:
                pass
            finally:
                _kill(process)
            os.set_blocking(read, False)
            try:
                said = os.read(read, 4096)
            except BlockingIOError:  # a grandchild in a session of its own still holds the pipe
                said = b""
            if process.returncode == -signal.SIGXCPU:
                return "timeout"
            return "right" if said == word.encode() and process.returncode == 0 else "wrong"
        finally:
            os.close(read)
            if write >= 0:
                os.close(write)


# Runs in the child: limits first, then the program from standard input. `resource` is imported there, before anything of the model's.
_LIMITS = """
import os, resource, sys
seconds, megabytes, fd = map(int, sys.argv[1:])
source = sys.stdin.buffer.read()
for name, soft in (("CPU", seconds), ("AS", megabytes << 20), ("FSIZE", 16 << 20), ("NOFILE", 64), ("CORE", 0), ("NPROC", 64)):
    limit = getattr(resource, "RLIMIT_" + name)
    hard = resource.getrlimit(limit)[1]
    soft = soft if hard == resource.RLIM_INFINITY else min(soft, hard)
    resource.setrlimit(limit, (soft, hard if name == "CPU" and hard != resource.RLIM_INFINITY else soft + (name == "CPU")))
if fd != 3:
    os.dup2(fd, 3)
    os.close(fd)
sys.argv = ["program"]
exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
"""


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@functools.cache
def _without_network() -> tuple[str, ...]:
    """The command that starts a process in an empty network namespace; nothing where the kernel does not let us."""
    tool = shutil.which("unshare")
    for flags in (["-n"], ["-r", "-n"]) if tool else ():
        if subprocess.run([tool, *flags, "true"], capture_output=True, check=False).returncode == 0:
            return tool, *flags, "--"
    return ()


def isolation() -> str:
    """What is shut off here, for the results."""
    return "no network, limits" if _without_network() else "limits (network open: unshare is not allowed here)"


def check_supported() -> None:
    """Raises UserError where processes cannot be limited."""
    try:
        import resource  # noqa: F401
    except ImportError:
        raise UserError("code benchmarks need a system with resource limits (Linux, macOS); leave them out of --suite") from None


def run_answer(response: str, task: Mapping[str, str], opened: bool = False, seconds: float = 10.0, megabytes: int = 1024) -> Execution:
    """Score one response.

    Args:
        task: `prompt` (code before the completion, or empty), `entry_point`, `tests` (source that fails where the answer is wrong).
    """
    text, closed = strip_thinking(response, opened)
    if not closed:
        return "truncated_thinking"
    # Leading spaces matter in a continuation; strip_thinking takes them off.
    raw = response.rpartition("</think>")[2] if "</think>" in response else response
    code = extract_code(raw.lstrip("\n") if text else "", task.get("prompt", ""), task.get("entry_point", ""))
    if code is None:
        return "unparsed"
    return run_code(f"{code}\n\n{task['tests']}", seconds, megabytes)


def run_answers(items: Sequence[tuple[str, Mapping[str, str], bool]], workers: int = 0, **limits):
    """Scores in order, a few at a time: an iterator, so that finished ones can be kept."""
    with ThreadPoolExecutor(workers or max(1, (os.cpu_count() or 2) // 2)) as pool:
        yield from pool.map(lambda item: run_answer(*item, **limits), items)
