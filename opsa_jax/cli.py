"""The `opsa` command, and what every `python -m opsa_jax.<name>` shares: typed flags, one-line errors, exit codes.

Exit codes: 0 done, 2 bad input (one line on stderr says what to do), 69 another process of the run did not join or died, 75 preempted
and saved (SIGTERM; the same command with --resume goes on), 130 interrupted.
"""

import contextlib
import importlib
import io
import os
import re
import sys
from collections.abc import Callable
from typing import TypeVar

import tyro

from opsa_jax.errors import Preempted, UserError, did_you_mean

COMMANDS = {
    "train": "train a model by on-policy distillation (no recipe: the embedded sandbox run)",
    "generate": "sample responses to a file of prompts",
    "answers": "make training answers: filtered self-generated ones, preference pairs, Cross-SFT data",
    "steer": "find a refusal direction and the safety tokens (SafeSteer's preparation)",
    "convert": "import, export or verify a Hugging Face checkpoint",
    "search": "search the teacher's context: flip rates of many candidates, on harmful and on benign prompts",
    "evaluate": "score a checkpoint: refusal, over-refusal, capability",
    "attack": "attack a checkpoint: prefilling, templates, rewrites, PAP, PAIR, many-shot, GCG, fine-tuning",
    "analyse": "look inside a trained model: token-level KL, drift, collapse probes",
    "plan": "compile a run ahead of time for a TPU slice or GPUs: does it fit, what bounds it",
    "report": "one HTML page of a run, or of several",
    "compare": "run recipes over seeds and bases, and draw the safety trade-off",
}
_CODES = """\
exit codes: 0 done; 2 bad input; 69 another process of the run did not join or died; 75 preempted and saved (the same command with
--resume goes on); 130 interrupted"""
T = TypeVar("T")
_TITLES = "Unrecognized options|Value error|Invalid choice|Missing argument|Required options|Parsing error"


def parse(kind: type[T], default: T | None, argv: list[str], prog: str, description: str | None = None) -> T:
    """Typed flags from a dataclass (or a union of them) by tyro; its boxed error reports become one line.

    Raises:
        UserError: unknown flag (with the nearest), missing or malformed value.
    """
    # "OPTIONS" in the usage line instead of a page of flags; docs of every field are in the body of --help.
    kwargs = {} if default is None else {"default": default}
    report = io.StringIO()
    try:
        with contextlib.redirect_stderr(report):
            return tyro.cli(kind, args=argv, prog=prog, description=description, config=(tyro.conf.OmitSubcommandPrefixes,), **kwargs)
    except SystemExit as e:
        if not e.code:
            raise
        raise UserError(_one_line(report.getvalue())) from None


def _one_line(report: str) -> str:
    """The message of a tyro error box, and its suggestion if it has one."""
    plain = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯]", "", report)
    sections = [" ".join(s.split()) for s in re.split(r"[-─]{8,}", plain)]
    message = next((s for s in sections if re.search(r"[:.'] ?", s)), sections[0])
    message = re.sub(rf"^({_TITLES})\s(?=\S+ )", "", message)
    hint = re.search(r"Perhaps you meant: (--\S+)", " ".join(sections))
    return message.rstrip(" .") + (f"; did you mean {hint.group(1)}?" if hint else "") + " (--help lists every flag)"


def entry(command: Callable[[list[str] | None], int], argv: list[str] | None = None) -> int:
    """Run an entry point's `main`; what a user can mend becomes one line and exit code 2."""
    # Quiet logs of libraries, unless the user asks for them.
    for name, value in (("TF_CPP_MIN_LOG_LEVEL", "2"), ("GRPC_VERBOSITY", "ERROR"), ("TOKENIZERS_PARALLELISM", "false")):
        os.environ.setdefault(name, value)
    name = command.__module__.rpartition(".")[2]
    name = os.path.splitext(os.path.basename(sys.argv[0]))[0] if name == "__main__" else name
    try:
        return command(argv)
    except UserError as e:
        print(f"opsa {name}: error: {' '.join(str(e).split())}", file=sys.stderr)
        return e.exit_code
    except Preempted as e:
        print(f"opsa {name}: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print(f"opsa {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`... | head`); nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def main() -> int:
    """Console script `opsa <command> ...`."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        lines = "\n".join(f"  {command:10s} {text}" for command, text in COMMANDS.items())
        print(f"usage: opsa <command> [options]     (opsa <command> --help for its options)\n\n{lines}\n\n{_CODES}")
        return 0
    if name not in COMMANDS:
        print(f"opsa: error: no command {name!r}{did_you_mean(name, COMMANDS)}", file=sys.stderr)
        return 2
    return entry(importlib.import_module(f"opsa_jax.{name}").main, sys.argv[2:])
