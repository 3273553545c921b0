"""One self-contained HTML page of runs: `python -m opsa_jax.report RUN...`."""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from opsa_jax.cli import entry, parse

DESCRIPTION = """\
Write one HTML page about one run or several, to be opened in any browser, without a network:

  python -m opsa_jax.report runs/sandbox-opsa
  python -m opsa_jax.report runs/opsa runs/sft runs/dpo --out report.html

Results before and after with intervals, training curves, the trade-off over all runs, transcripts; and, where
`python -m opsa_jax.analyse RUN` was run before, token-level KL, drift of representations, collapse probes and the teacher's results.
Output folders of compare and search may be given too. Completions of harmful requests are blurred until they are clicked."""


@dataclass(frozen=True)
class ReportConfig:
    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run directories; also output folders of compare and of search."""
    out: str = "report.html"
    """File to write; an earlier report there is replaced."""
    title: str = "Safety alignment report"
    """Title of the page."""
    transcripts: int = 4
    """Transcripts shown per metric and run."""
    safety: tuple[str, ...] = ("asr_seen", "asr_heldout", "asr_jailbreak")
    """Attack metrics of the trade-off; safety is 1 - their mean. Where a suite has none of them, all its attack metrics."""
    figures: str = ""
    """Folder for the trade-off over the runs as tradeoff.png, .svg, .csv and .json (analyse writes all other figures)."""


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    config = parse(ReportConfig, None, argv, "python -m opsa_jax.report", DESCRIPTION)
    from opsa_jax.analysis.html import write_report

    figures = Path(config.figures) if config.figures else None
    print(write_report(config.runs, Path(config.out), config.title, config.transcripts, config.safety, figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(entry(main))
