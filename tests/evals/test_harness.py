"""Log-likelihoods against transformers, and lm-eval running our model on a local task; lm-eval's parts are skipped where it is missing."""

import json

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from opsa_jax import paths
from opsa_jax.config import EvalConfig, MeshConfig
from opsa_jax.data.chat import Chat
from opsa_jax.errors import UserError
from opsa_jax.evals import harness
from opsa_jax.evals.capability import score_gsm8k
from opsa_jax.evals.likelihood import best_option, choice_pairs, score_continuations
from opsa_jax.evals.runner import respond
from opsa_jax.evals.suite import load_suite
from opsa_jax.models.hf import load_config, load_params
from opsa_jax.parallel.mesh import make_mesh


@pytest.fixture(scope="module")
def base():
    """Parameters, config and chat of the embedded base, and the same model in transformers."""
    cfg, _ = load_config("sandbox:base")
    folder = paths.resolve("sandbox:base")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return load_params(folder, cfg, "float32", make_mesh(MeshConfig(), jax.devices()[:1])), cfg, Chat.load("sandbox:base"), model


def reference(model, context, continuation):
    """Log-probabilities of the continuation and whether it is greedy, in float64 from transformers' logits."""
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *continuation]])).logits[0].double()
    logp = torch.log_softmax(logits, -1)[len(context) - 1 : -1]
    ids = torch.tensor(continuation)
    return logp.gather(1, ids[:, None])[:, 0].numpy(), bool((logp.argmax(-1) == ids).all())


def pairs(chat):
    sums = [r for r in load_suite("sandbox") if r.extra.get("subtype") == "sum2"][:6]
    found = []
    for i, r in enumerate(sums):
        context = chat.encode(r.prompt)
        answer = chat.encode_texts([f"<think>\n{'a ' * (3 * i)}</think>\n\n{r.extra['expect']}"])[0].tolist()
        found += [(context, answer), (context[: i + 1], context[i + 1 :])]
    return [*found, (context, [])]


def test_loglikelihoods_equal_transformers(base):
    params, cfg, chat, model = base
    rows = pairs(chat)
    scored = score_continuations(params, cfg, rows, batch=5)
    for (context, continuation), got in zip(rows[:-1], scored, strict=False):
        logp, greedy = reference(model, context, continuation)
        assert np.abs(got.logp_T - logp).max() < 1e-4 and got.greedy == greedy
    assert scored[-1].total == 0 and scored[-1].greedy
    again = score_continuations(params, cfg, rows, batch=13)
    assert all(np.allclose(a.logp_T, b.logp_T, atol=1e-4) for a, b in zip(scored, again, strict=True)), "depends on the batch"


def test_greedy_is_seen(base):
    """What greedy decoding wrote is greedy; with its last token changed it is not."""
    params, cfg, chat, _ = base
    records = [r for r in load_suite("sandbox") if r.extra["metric"] == "capability"][:3]
    prompts = [chat.encode(r.prompt) for r in records]
    texts = respond(params, cfg, chat, records, prompts, EvalConfig(), 0)
    answers = [chat.encode_texts([t])[0].tolist() for t in texts]
    changed = [[*a[:-1], (a[-1] + 1) % cfg.vocab_size] for a in answers]
    scored = score_continuations(params, cfg, [*zip(prompts, answers, strict=True), *zip(prompts, changed, strict=True)])
    assert [s.greedy for s in scored] == [True] * 3 + [False] * 3


def test_sharded_over_devices(base):
    params, cfg, chat, _ = base
    rows = pairs(chat)
    plain = score_continuations(params, cfg, rows, batch=4)
    mesh = make_mesh(MeshConfig(fsdp=4), jax.devices()[:4])
    with jax.set_mesh(mesh):
        split = score_continuations(load_params(paths.resolve("sandbox:base"), cfg, "float32", mesh), cfg, rows, batch=3)
    assert all(np.allclose(a.logp_T, b.logp_T, atol=1e-4) and a.greedy == b.greedy for a, b in zip(plain, split, strict=True))


def test_multiple_choice_asks_for_letters(base):
    params, cfg, chat, model = base
    record = load_suite("sandbox")[0]
    record = type(record)(id="x", prompt="what is 2 + 3?", label="benign", extra={"options": 3})
    rows = choice_pairs(chat, record, chat.encode(record.prompt), opened=False)
    assert len(rows) == 3 and len({tuple(c) for c, _ in rows}) == 1
    letter, totals = best_option(score_continuations(params, cfg, rows))
    expected = [reference(model, c, o)[0].sum() for c, o in rows]
    assert np.allclose(totals, expected, atol=1e-3) and letter == "ABC"[int(np.argmax(expected))]


GSM = """\
task: local_gsm8k
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
num_fewshot: 0
generation_kwargs: {{until: ["Question:"], do_sample: false, max_gen_toks: 64}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, regexes_to_ignore: [",", "\\\\$", "(?s).*#### ", "\\\\.$"]}}
filter_list:
  - name: flexible-extract
    filter: [{{function: regex, group_select: -1, regex_pattern: "(-?[$0-9.,]{{2,}})|(-?[0-9]+)"}}, {{function: take_first}}]
"""


def test_lm_eval_agrees_with_our_scorer(base, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    params, cfg, chat, _ = base
    records = [r for r in load_suite("sandbox") if r.extra.get("subtype") in ("sum2", "sum3")][:24]
    rows = [{"question": r.prompt, "answer": f"so\n#### {int(r.extra['expect']) + (i % 3 == 0)}"} for i, r in enumerate(records)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "local.yaml").write_text(GSM.format(file=tmp_path / "test.jsonl"))
    lm = harness.make_lm(params, cfg, chat, batch=16)
    results = harness.run_tasks(lm, str(tmp_path / "local.yaml"))
    theirs = results["results"]["local_gsm8k"]["exact_match,flexible-extract"]
    responses = respond(params, cfg, chat, records, [chat.encode(r.prompt) for r in records], EvalConfig(), 0)
    ours = [score_gsm8k(t, r["answer"]) for t, r in zip(responses, rows, strict=True)]
    assert theirs == pytest.approx(ours.count("right") / len(ours), abs=1e-9) and 0.3 < theirs < 0.9
    samples = {s["doc_id"]: s for s in results["samples"]["local_gsm8k"]}
    assert all(samples[i]["exact_match"] == (o == "right") for i, o in enumerate(ours))


def test_lm_eval_requests(base):
    """The three kinds of requests, against transformers and by their rules."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    params, cfg, chat, model = base
    lm = harness.make_lm(params, cfg, chat, batch=4, max_length=16)

    def ask(kind, *arguments):
        return getattr(lm, kind)([Instance(kind, {}, a, i) for i, a in enumerate(arguments)], disable_tqdm=True)

    (total, greedy), empty = ask("loglikelihood", ("what is 2 + 3 ?", " the stone"), ("", "the stone"))
    context, continuation = lm._encode_pair("what is 2 + 3 ?", " the stone")
    logp, expected = reference(model, context, continuation)
    assert total == pytest.approx(logp.sum(), abs=1e-4) and greedy == expected
    assert empty[0] == pytest.approx(reference(model, [lm.prefix_token_id], lm.tok_encode("the stone"))[0].sum(), abs=1e-4)
    # Rolling: every token once, those beyond the window with what fits before them.
    text = "the stone of the king is a stone and the king is a king of the stone . what is 2 + 3 ?"
    ids = lm.tok_encode(text)
    assert len(ids) > 16
    first = reference(model, [lm.prefix_token_id], ids[:16])[0].sum()
    rest = ids[len(ids) - 17 :]
    n = len(ids) - 16
    second = reference(model, rest[: 17 - n], rest[17 - n :])[0].sum()
    assert ask("loglikelihood_rolling", (text,))[0] == pytest.approx(first + second, abs=2e-4)
    long = harness.make_lm(params, cfg, chat, batch=4)
    prompt = long.apply_chat_template([{"role": "user", "content": "what is 69 + 46?"}])
    whole, cut = long.generate_until(
        [Instance("generate_until", {}, (prompt, {"until": u, "max_gen_toks": 64}), i) for i, u in enumerate(([], ["1"]))]
    )
    assert "<think>" not in whole and whole.startswith(cut) and "1" not in cut
    with pytest.raises(UserError, match="generation setting 'num_beams' is not supported"):
        long.generate_until([Instance("generate_until", {}, (prompt, {"num_beams": 4}), 0)])


def test_lm_eval_bad_input(base, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    params, cfg, chat, _ = base
    lm = harness.make_lm(params, cfg, chat)
    with pytest.raises(UserError, match=r"nothing.yaml is no task"):
        harness.run_tasks(lm, str(tmp_path / "nothing.yaml"))
    (tmp_path / "local.yaml").write_text(GSM.format(file=tmp_path / "missing.jsonl"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="data cannot be read"):
        harness.run_tasks(lm, str(tmp_path / "local.yaml"))


def test_without_lm_eval(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'opsa_jax\[eval\]'"):
        harness.require_lm_eval()
