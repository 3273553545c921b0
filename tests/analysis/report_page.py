"""A run directory written by hand, with hostile text in every place that text can have, and a strict reader of pages."""

import json
from html.parser import HTMLParser
from pathlib import Path

from opsa_jax.evals.scorers import wilson

HOSTILE = """</script><script>alert("x")</script><img src=x onerror='alert(1)'> "quoted" 'single' & &amp; {{ 7*7 }} </div><!-- ]]>"""


def cell(successes: int, n: int) -> dict:
    low, high = wilson(successes, n)
    return {"rate": successes / n, "n": n, "low": low, "high": high}


def transcripts(refused: int, n: int = 20, answer: str = "take the key") -> list[dict]:
    rows = [
        {"id": f"a{i}", "metric": "asr_seen", "prompt": f"prompt {i} {HOSTILE}", "prefill": HOSTILE, "response": f"{answer} a{i} {HOSTILE}",
         "outcome": "refused" if i < refused else "complied"} for i in range(n)
    ]  # fmt: skip
    task = {"metric": "capability", "prompt": "add", "prefill": "", "response": "4", "outcome": "right"}
    return rows + [{"id": f"c{i}", **task} for i in range(4)]


def make_run(folder: Path, analysis: bool = True, trained_refused: int = 18) -> Path:
    """A finished run; base refuses 2 of 20, trained `trained_refused` of 20."""
    (folder / "evals").mkdir(parents=True)
    config = {"model": {"path": HOSTILE}, "objective": {"loss": "divergence", "divergence": "mix", "support": "full"},
              "rollout": {"writer": "student"}}  # fmt: skip
    write(folder / "config.json", {"config": config, "config_hash": "abc123", "command": f"train {HOSTILE}", "versions": {"jax": HOSTILE}})
    rows = [{"step": i, "loss": 1 / i, "kl_forward": 0.5 / i, "kl_reverse": 0.4 / i, "refused_harmful": i / 10} for i in range(1, 8)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    results = {}
    for name, refused in (("base", 2), ("trained", trained_refused)):
        lines = transcripts(refused)
        (folder / "evals" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
        free = {"rate": 33.25, "n": 5, "low": 31.0, "high": 35.5}
        results[name] = {"asr_seen": cell(20 - refused, 20), "capability": cell(4, 4), HOSTILE: cell(1, 3), "freeform_words": free}
    write(folder / "results.json", results)
    if analysis:
        make_analysis(folder / "analysis")
    return folder


def make_analysis(folder: Path) -> None:
    folder.mkdir()
    models = {"base": "b", "trained": "t"}
    settings = {"models": models, "minimum": 1, "layer": -1, "drift_at": "response"}
    curve = {"mean": [0.1, 0.9], "low": [0.0, 0.8], "high": [0.2, 1.0], "n": [3, 3]}
    pairs = [("harmful", p) for p in ("teacher vs base", "teacher vs trained", "trained || base")] + [("benign", "trained || base")]
    kind = [{"kind": k, "pair": p, "unit": "nats", **curve} for k, p in pairs]
    summary = [{"kind": k, "pair": p, "tokens": 2, "mean": 0.5, "peak": 1, "half_in": 0.5} for k, p in pairs]
    types = [{"pair": "teacher vs base", "types": [{"token": HOSTILE, "text": HOSTILE, "id": 1, "count": 9, "mean": 0.4, "residual": 0.1}]}]
    write(folder / "token_kl.json", {"settings": settings, "summary": summary, "positions": kind, "types": types})
    values = {"teacher vs base": [0.1, 2.5, 0.0], "trained || base": [0.0, 1.0, 0.0]}
    rows = [
        {"kind": "harmful", "id": "h0", "prompt": HOSTILE, "tokens": [" heat", HOSTILE, "\n"], "values": values, "refused": False},
        {"kind": "harmful", "id": "h1", "prompt": "p", "tokens": ["no", " way", ""], "values": values, "refused": True},
        {"kind": "benign", "id": "b0", "prompt": "p", "tokens": ["sure", ",", "ok"], "values": values, "refused": False},
    ]
    (folder / "token_kl_rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    moved = {"points": [[0.0, 0.0], [1.0, 1.0], [2.0, 0.5]], "distance": 0.123, "displacement": 0.456, "wasserstein": [0.1, 0.2]}
    records = [{"id": HOSTILE, "kind": "benign"}] * 3
    drift = {"settings": settings, "records": records, "explained": [0.6, 0.3], "models": {"base": moved, HOSTILE: moved}}
    write(folder / "drift.json", drift)
    probe = {"words": {"rate": 26.4, "n": 5, "low": 25.0, "high": 28.0}}
    write(folder / "collapse.json", {"settings": settings, "models": {"base": probe, "trained": probe}})


def write(path: Path, value) -> None:
    path.write_text(json.dumps(value))


class Page(HTMLParser):
    """Elements with attributes, the text under each, and whether tags are balanced."""

    VOID = ("meta", "img", "br", "hr", "input", "link")

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.cells: dict[str, list[str]] = {}
        self._open: list[tuple[str, dict]] = []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        opened = self._open.pop()[0]
        assert opened == tag, f"</{tag}> closes <{opened}>"

    def handle_data(self, data):
        self.texts.append((tuple(t if "class" not in a else f"{t}.{a['class']}" for t, a in self._open), data))
        metric = next((a["data-metric"] for _, a in self._open if "data-metric" in a), None)
        if metric is not None and data.strip() and any(t == "td" for t, _ in self._open):
            self.cells.setdefault(metric, []).append(data.strip())

    def under(self, name: str) -> list[str]:
        """Texts below an element `tag.class`."""
        return [text for path, text in self.texts if name in path]
