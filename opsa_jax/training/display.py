"""What a person watches: the progress bar, the table of sample responses, the summary of the run."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Sample:
    """One rollout, decoded."""

    label: str
    prompt: str
    response: str
    refused: bool


def redact(sample: Sample, show_harmful: bool) -> str:
    """The response as it may be printed: a compliant response to a harmful prompt is replaced by its length, unless asked for."""
    if show_harmful or sample.refused or sample.label != "harmful":
        return sample.response
    return f"[redacted: not a refusal, {len(sample.response.split())} words; --log.show-harmful prints it]"


class Display:
    """Progress bar and tables of one run. Off, or not on a terminal, it prints a plain line now and then instead."""

    def __init__(self, total: int, done: int, show: bool, console: Console | None = None):
        self.console = console or Console(highlight=False)
        self._every = max(total // 10, 1)
        self._total = total
        columns = (
            TextColumn("train"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        self._bar = Progress(*columns, console=self.console, disable=not (show and self.console.is_terminal))
        self._task = self._bar.add_task("train", total=total, completed=done, numbers="compiling")
        self._lines = show and not self.console.is_terminal

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def update(self, step: int, row: dict[str, float]) -> None:
        """The numbers that matter, after update `step`."""
        parts = [f"{short} {row[name]:.{digits}f}" for name, short, digits in _SHOWN if name in row]
        numbers = "  ".join(parts)
        self._bar.update(self._task, completed=step, numbers=numbers)
        if self._lines and (step % self._every == 0 or step in (1, self._total)):
            self.console.print(f"update {step}/{self._total}  {numbers}", soft_wrap=True)

    def samples(self, step: int, rows: Sequence[Sample], show_harmful: bool) -> None:
        """A table of rollouts made before update `step`."""
        table = Table(title=f"rollouts at update {step}", title_justify="left", expand=False)
        for name in ("label", "refused", "prompt", "response"):
            table.add_column(name, overflow="fold")
        for s in rows:
            # Text, not markup: a response may contain brackets.
            table.add_row(s.label, "yes" if s.refused else "no", Text(_flat(s.prompt)), Text(_flat(redact(s, show_harmful))))
        self.console.print(table)


def _flat(text: str) -> str:
    return " ".join(text.split())


_SHOWN = (
    ("loss", "loss", 4),
    ("kl_forward", "KL(T,S)", 4),
    ("kl_reverse", "KL(S,T)", 4),
    ("refused_harmful", "refused harmful", 2),
    ("refused_benign", "benign", 2),
    ("response_tokens", "tokens", 0),
    ("finished", "finished", 2),
    ("tokens_per_second", "tok/s", 0),
    ("share_rollout", "rollout", 2),
    ("share_update", "update", 2),
)
