"""The page: text stays text, numbers are those of the files, nothing is loaded from elsewhere, harmful completions are blurred."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from urllib.parse import unquote

import numpy as np
import pytest
from report_page import HOSTILE, Page, cell, make_run, write

from opsa_jax import report
from opsa_jax.analysis import charts, differences, plots, report_data
from opsa_jax.cli import entry
from opsa_jax.evals.scorers import wilson


def page_of(tmp_path, *runs, flags=()) -> tuple[str, Page]:
    out = tmp_path / "report.html"
    assert entry(report.main, [*map(str, runs), "--out", str(out), *flags]) == 0
    text = out.read_text()
    assert not out.with_name("report.html.tmp").exists()
    return text, Page(text)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return page_of(folder, make_run(folder / "run"), flags=["--title", HOSTILE, "--transcripts", "6"])


def test_hostile_text_stays_text(page):
    text, found = page
    tags = [t for t, _ in found.elements]
    assert tags.count("script") == tags.count("style") == 1 and "img" not in tags and "<!--" not in text
    allowed = {
        "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "h3", "button", "main", "p", "section", "div", "span", "b",
        "small", "table", "tr", "th", "td", "figure", "figcaption", "svg", "line", "text", "circle", "polyline", "polygon", "g", "i", "a",
        "details", "summary", "code", "pre", "footer", "script", "nav",
    }  # fmt: skip
    assert set(tags) <= allowed
    # No handler attributes, whatever the text was.
    assert not [a for _, attrs in found.elements for a in attrs if a.startswith("on")]
    # And the text is there, as it was, in the places where it belongs.
    for place in ("div.asked", "div.answer", "h1", "code", "div.tokens"):
        assert any(HOSTILE in t for t in found.under(place)), place
    assert any(HOSTILE[:18] in (a.get("title") or "") for _, a in found.elements)
    assert "49" not in "".join(found.under("div.asked"))  # templates in data are not run


def test_self_contained(page):
    text, found = page
    for tag, attrs in found.elements:
        for name in ("src", "srcset", "action", "data", "poster", "xlink:href"):
            assert name not in attrs, (tag, name)
        if "href" in attrs:
            assert attrs["href"].startswith(("#", "data:text/csv")), attrs["href"]
    css = "".join(found.under("style"))
    assert "url(" not in css and "@import" not in css
    code = "".join(found.under("script"))
    assert not re.search(r"fetch|XMLHttpRequest|import\(|https?:", code)
    policy = next(a["content"] for t, a in found.elements if t == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy
    # The policy allows exactly the script of the page.
    inside = re.search(r"<script>(.*?)</script>", text, re.S).group(1)
    assert base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode() in policy


def test_numbers_in_the_table_are_those_of_the_results(page, tmp_path):
    found = page[1]
    results = json.loads((make_run(tmp_path / "run") / "results.json").read_text())
    for metric, digits in (("asr_seen", 3), ("capability", 3), ("freeform_words", 1), (HOSTILE, 3)):
        row = found.cells[metric]
        before, after = results["base"][metric], results["trained"][metric]
        for c in (before, after):
            at = row.index(f"{c['rate']:.{digits}f}")
            assert row[at + 1] == f"{c['low']:.{digits}f} to {c['high']:.{digits}f}"
            assert str(c["n"]) in row
        assert f"{after['rate'] - before['rate']:+.{digits}f}" in row
    # 2 and 18 refusals of 20, the first two the same records: no record complies only afterwards.
    low, high = differences.newcombe_paired(2, 16, 0, 2)
    assert f"{low:+.3f} to {high:+.3f}" in found.cells["asr_seen"]


def test_harmful_completions_are_blurred_and_nothing_else(page):
    found = page[1]
    veiled = "".join(found.under("div.under-veil"))
    answers = [(path, t) for path, t in found.texts if any(p == "div.answer" for p in path) and "take the key" in t]
    outcomes = {"complied": 0, "refused": 0}
    for path, t in answers:
        number = int(re.search(r"a(\d+)", t).group(1))
        # By base (2 refuse) and trained (18 refuse); ids from 2 to 17 differ, so both occur.
        hidden = "div.veil" in path
        outcomes["complied" if hidden else "refused"] += 1
        if number < 2:
            assert not hidden
        if number >= 18:
            assert hidden
    assert min(outcomes.values()) > 0 and "take the key" in veiled
    assert " heat" in veiled  # the harmful rollout of the heat map
    assert " way" in found.under("span") and " way" not in found.under("div.under-veil")  # a refusal of a harmful prompt
    assert ("sure" in "".join(found.under("div.tokens"))) and "sure" not in veiled
    css = "".join(found.under("style"))
    assert re.search(r"\.veil:not\(\.open\) > \.under-veil \{[^}]*blur", css)


def test_heat_values_can_be_hovered(page):
    titles = [a["title"] for t, a in page[1].elements if t == "span" and "title" in a]
    assert "position 0, heat: teacher vs base 0.1; trained || base 0" in titles
    shades = [a["style"] for t, a in page[1].elements if t == "span" and "title" in a]
    assert shades[0].startswith("--s0:0.17") and "--s0:0.850" in shades[1]  # the square root of 0.1 / 2.5, times 0.85


def test_a_run_without_analysis_says_how_to_make_it(tmp_path):
    _, found = page_of(tmp_path, make_run(tmp_path / "run", analysis=False))
    notes = "".join(found.under("p.note"))
    assert f"python -m opsa_jax.analyse {tmp_path / 'run'}" in notes and "drift" in notes
    assert "heat" not in [a.get("class") for _, a in found.elements]


def test_an_unfinished_run_and_missing_files(tmp_path):
    run = make_run(tmp_path / "run", analysis=False)
    (run / "results.json").unlink()
    shutil.rmtree(run / "evals")
    with (run / "metrics.jsonl").open("a") as f:
        f.write('{"step": 8, "lo')  # a kill
    text, found = page_of(tmp_path, run)
    assert "7 updates" in text and "unfinished" in "".join(found.under("p.note"))
    (run / "analysis").mkdir()
    (run / "evals").mkdir()
    write(run / "evals/base.json", {"asr_seen": cell(3, 4)})
    assert "0.750" in page_of(tmp_path, run)[1].cells["asr_seen"]


def test_several_runs_a_comparison_and_a_search(tmp_path):
    runs = [make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run", analysis=False, trained_refused=10)]
    comparison, search = tmp_path / "compare", tmp_path / "search"
    comparison.mkdir(), search.mkdir()
    metrics = {"asr_seen": cell(1, 20), "capability": cell(19, 20), "over_refusal": cell(0, 20)}
    rows = [
        {"arm": HOSTILE, "base": "b", "steps": 5, "seed": s, "run": "r", "status": "done", "metrics": metrics, "base_metrics": metrics}
        for s in (0, 1)
    ]
    (comparison / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*rows, {"arm": "x", "status": "failed"}]))
    point = {"tfr": cell(5, 10), "benign_flip_rate": cell(1, 10)}
    candidate = {"name": HOSTILE, "select": point, "held_out": point}
    write(search / "results.json", {"candidates": [candidate, candidate], "paper": candidate, "chosen": candidate})
    figures = tmp_path / "figures"
    text, found = page_of(tmp_path, *runs, comparison, search, flags=["--figures", str(figures)])
    assert found.under("h2") == ["Overview", "a/run", "b/run"]
    overview = "".join(found.under("td"))
    assert "b/run" in overview and HOSTILE in overview and overview.count("0.500") >= 1
    assert "Context search search" in "".join(found.under("figcaption"))
    assert {p.suffix for p in figures.iterdir()} == {".png", ".svg", ".csv", ".json"}
    data = json.loads((figures / "tradeoff.json").read_text())["rows"]
    by_name = {r["name"]: r for r in data}
    assert by_name["a/run"]["safety"] == pytest.approx(0.9) and by_name["b/run"]["safety"] == pytest.approx(0.5)
    assert sum(r["model"] == "base" for r in data) == 2  # that of the two runs once, and that of the comparison
    assert "<script>alert" not in text


def test_data_of_a_chart_can_be_taken_along(page):
    links = [a for t, a in page[1].elements if t == "a" and a.get("download") == "distillation.csv"]
    rows = unquote(links[0]["href"].partition(",")[2]).splitlines()
    assert rows[0] == "step,kl_forward,kl_reverse" and rows[1] == "1,0.5,0.4" and len(rows) == 8


@pytest.mark.parametrize("case", ["none", "nowhere", "empty", "nothing", "damaged", "wrong", "folder", "unwritable", "number"])
def test_mistakes_are_one_line(tmp_path, capsys, case):
    run, out = make_run(tmp_path / "run"), tmp_path / "out.html"
    argv = [str(run), "--out", str(out)]
    (tmp_path / "plain").mkdir()
    if case == "none":
        argv, message = argv[1:], "at least one run directory"
    elif case == "nowhere":
        argv[0], message = str(tmp_path / "nowhere"), "there is no run directory"
    elif case == "empty":
        argv[0], message = str(tmp_path / "plain"), "is no run directory"
    elif case == "nothing":
        (run / "results.json").unlink(), (run / "metrics.jsonl").unlink(), shutil.rmtree(run / "evals"), shutil.rmtree(run / "analysis")
        message = "nothing finished"
    elif case == "damaged":
        (run / "analysis/drift.json").write_text("{")
        message = "drift.json cannot be read"
    elif case == "wrong":
        write(run / "analysis/drift.json", {"models": {}})
        message = "lacks what the report needs"
    elif case == "folder":
        argv[2], message = str(tmp_path / "plain"), "is a folder"
    elif case == "unwritable":
        argv[2], message = str(run / "config.json" / "x.html"), "cannot be written"
    else:
        argv, message = [*argv, "--transcripts", "-1"], "must be 0 or above"
    assert entry(report.main, argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not out.exists()


def test_paired_interval_covers():
    """Simulated pairs of proportions: close to 95 % of the intervals hold the true difference, also for extreme rates."""
    rng = np.random.default_rng(0)
    for probabilities in ([0.02, 0.85, 0.01, 0.12], [0.6, 0.1, 0.2, 0.1], [0.95, 0.03, 0.01, 0.01]):
        truth = probabilities[2] - probabilities[1]
        counts = rng.multinomial(60, probabilities, size=2000)
        intervals = [differences.newcombe_paired(*map(int, c)) for c in counts]
        share = np.mean([low <= truth <= high for low, high in intervals])
        assert 0.93 < share <= 1.0, (probabilities, share)
        assert all(low <= (c[2] - c[1]) / 60 <= high for (low, high), c in zip(intervals, counts))


def test_pairs_narrow_where_models_agree_and_fall_back():
    paired, independent = differences.newcombe_paired(40, 0, 5, 35), differences.newcombe(40 / 80, 80, 45 / 80, 80)
    assert paired[1] - paired[0] < 0.6 * (independent[1] - independent[0])
    a, b = cell(1, 4), cell(2, 4)
    pairs = [(True, True), (False, True), (False, False), (False, False)]
    assert differences.difference("asr_x", a, b, pairs)["method"] == "paired"
    assert differences.difference("asr_x", a, b, pairs[:3])["method"] == "independent"
    assert differences.difference("asr_x", a, cell(3, 4), pairs)["method"] == "independent"  # transcripts of other results
    found = differences.difference("freeform_words", {"rate": 5.0, "low": 2.0, "high": 8.0}, {"rate": 6.0, "low": 2.0, "high": 10.0})
    assert found == {"difference": 1.0, "low": -4.0, "high": 6.0, "method": "mean"}


def test_mean_rate_against_simulation():
    rng = np.random.default_rng(1)
    truth, n, hits = (0.1, 0.5, 0.9), 50, 0
    for _ in range(1000):
        found = differences.mean_rate([cell(int(k), n) for k in rng.binomial(n, truth)])
        hits += found["low"] <= 0.5 <= found["high"]
    assert 0.93 < hits / 1000 < 0.98
    assert differences.mean_rate([cell(3, 9)])["low"] == pytest.approx(wilson(3, 9)[0])


def test_sampled_transcripts_are_half_changed_and_repeat(tmp_path):
    run = report_data.load([str(make_run(tmp_path / "run"))]).runs[0]
    first, second = (report_data.sample_transcripts(run, 6)[0] for _ in range(2))
    assert first == second and (first["changed"], first["total"], len(first["rows"])) == (16, 20, 6)
    changed = [r["answers"]["base"]["outcome"] != r["answers"]["trained"]["outcome"] for r in first["rows"]]
    assert all(changed[:3]) and len({r["id"] for r in first["rows"]}) == 6


@pytest.mark.parametrize("distilled", [True, False])
def test_a_run_without_a_teacher_shows_its_loss(tmp_path, distilled, monkeypatch):
    run, titles = make_run(tmp_path / "run", analysis=False), []
    if not distilled:
        rows = [{"step": i, "loss": 1 / i, "response_tokens": 9.0} for i in range(1, 5)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    save = plots.save
    monkeypatch.setattr(plots, "save", lambda fig, *a: (titles.append([ax.get_title() for ax in fig.axes]), save(fig, *a)))
    plots.plot_run(run)
    plots.plot_training(run, tmp_path)
    assert [t[:2] for t in titles] == [["Distillation", "Rollouts that refuse"] if distilled else ["Loss", "Length of responses"]] * 2
    assert {"plot.png", "plot.svg"} <= {p.name for p in run.iterdir()}
    assert (tmp_path / "training.csv").read_text().startswith("step,loss")
    _, found = page_of(tmp_path, run)
    assert ("Distillation" in found.under("figcaption")) == distilled and "Loss" in found.under("figcaption")


@pytest.mark.parametrize("low, high", [(0, 1), (-3.2, 7.9), (0, 1e-4), (1, 1), (0, 12345)])
def test_ticks_are_inside_and_even(low, high):
    found = charts.ticks(low, high)
    assert found and all(low - 1e-9 <= t <= high + 1e-9 for t in found) and len(found) <= 7
    if len(found) > 2:
        np.testing.assert_allclose(np.diff(found), found[1] - found[0], rtol=1e-6)


def test_charts_of_odd_data():
    """One point, equal values, no spread: no NaN in the picture."""
    mark = charts.Mark("a", "red", 1.0, 1.0)
    pictures = [
        charts.scatter([mark] * 5, "x", "y", (None, 1.0), (None, 1.0)),
        charts.line_chart([charts.Series("s", "red", [1], [0.0])], "x", "y"),
        charts.dot_chart([("<b>", [charts.Dot("d", "red", 0.0)])], "x"),
        charts.marginal_scatter([("g", "red", [[0.0, 0.0]], True)], "x", "y"),
    ]
    for svg in pictures:
        assert "nan" not in svg and "inf" not in svg and "<b>" not in svg
        Page(str(svg))


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1200, 390])
def test_opens_in_a_browser_without_an_error(tmp_path, width):
    """No console message, no scrolling sideways, blurred until clicked, hidden again after a second click."""
    text, _ = page_of(tmp_path, make_run(tmp_path / "run"))
    said = browse(tmp_path, tmp_path / "report.html", width)[1]
    assert "CONSOLE" not in said, said[-2000:]
    # The same page with a probe that clicks and writes down what it sees (its policy would not let the probe run).
    probed = re.sub(r"<meta http-equiv[^>]*>", "", text).replace("</body>", f"<script>{PROBE}</script></body>")
    (tmp_path / "probed.html").write_text(probed)
    # A frame has any width; windows do not go below 500 pixels.
    frame = f'<iframe src="probed.html" style="width:{width}px;height:900px"></iframe><script>addEventListener("message", e => ' + (
        "{ const out = document.createElement('pre'); out.id = 'seen'; out.textContent = e.data; document.body.append(out); })</script>"
    )
    (tmp_path / "frame.html").write_text(f"<body>{frame}</body>")
    shown, said = browse(tmp_path, tmp_path / "frame.html", width)
    assert "CONSOLE" not in said, said[-2000:]
    seen = json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', shown, re.S).group(1)))
    assert "blur" in seen["before"] and seen["open"] == "none" and "blur" in seen["after"]
    assert seen["width"] == width and seen["sideways"] <= 0
    assert seen["picked"] == "true" and seen["flips"] and seen["read"].startswith("position 0")


PROBE = """addEventListener("load", () => {
  const d = document, veil = d.querySelector(".veil"), look = () => getComputedStyle(veil.querySelector(".under-veil")).filter;
  const click = (s, i = 0) => { const x = d.querySelectorAll(s)[i]; x.click(); return x; }, seen = { before: look() };
  veil.querySelector(".reveal").click(); seen.open = look();
  veil.querySelector(".reveal").click(); seen.after = look();
  seen.picked = click(".pick button", 1).getAttribute("aria-pressed");
  seen.read = click(".tokens span").closest(".card").querySelector(".readout").textContent;
  const back = () => getComputedStyle(d.body).backgroundColor, was = back();
  click("#theme"); seen.flips = was !== back();
  seen.width = innerWidth; seen.sideways = d.documentElement.scrollWidth - innerWidth;
  parent.postMessage(JSON.stringify(seen), "*");
});"""


def browse(folder, file, width) -> tuple[str, str]:
    """The page after its scripts ran, and what the browser said."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr",
             f"--window-size={max(width, 500)},900", "--virtual-time-budget=2000", "--dump-dom", f"file://{file}"]  # fmt: skip
    done = subprocess.run([CHROMIUM, *flags], capture_output=True, text=True, timeout=180, check=True)
    return done.stdout, done.stderr
