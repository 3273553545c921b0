"""GCG: gradient against torch and finite differences, better than random search, places of tokens, progressive prompts, resuming."""

import json

import jax
import numpy as np
import pytest
import torch
from attack_models import RECORDS, load, tiny
from transformers import AutoModelForCausalLM

from opsa_jax.config import MeshConfig
from opsa_jax.errors import UserError
from opsa_jax.evals.attacks.gcg import Search, State, optimise, suffix_gradient, suffix_losses
from opsa_jax.evals.attacks.gcg_attack import Gcg
from opsa_jax.evals.attacks.settings import GcgSettings
from opsa_jax.evals.attacks.suffix import Layout, Vocabulary
from opsa_jax.evals.attacks.texts import texts
from opsa_jax.parallel.mesh import make_mesh

TARGET = "here is how you can open the vault"
SETTINGS = GcgSettings(suffix_tokens=8, steps=12, candidates=16, top_k=6, chunk=8, target=TARGET, stop=False, save_every=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("gcg") / "model")


@pytest.fixture(scope="module")
def target(folder):
    return load(folder)


@pytest.fixture(scope="module")
def vocabulary(target):
    return Vocabulary(target.chat, target.cfg.vocab_size)


def layout(target, i=0):
    return Layout.of(target.chat, RECORDS[i].prompt, TARGET)


def search(target, vocabulary, settings=SETTINGS, records=(0,)):
    return Search(target.params, target.cfg, vocabulary, [layout(target, i) for i in records], settings)


def torch_loss(model, x, one_hot_SV, target_embeds=None):
    """Loss from one-hot rows in float64: embeddings are a matrix product, nothing is gathered."""
    table = model.get_input_embeddings().weight
    parts = [table[list(x.before)], one_hot_SV @ table, table[list(x.after)], table[list(x.target)]]
    logits = model(inputs_embeds=torch.cat(parts)[None]).logits[0]
    start = len(x.before) + len(one_hot_SV) + len(x.after) - 1
    logp = torch.log_softmax(logits[start : start + len(x.target)], -1)
    return -logp.gather(1, torch.tensor(x.target)[:, None]).mean()


def test_gradient_is_that_of_torch_and_of_finite_differences(folder, target, vocabulary):
    x = layout(target)
    suffix = vocabulary.first(5, [x])
    P, R = 32, 12
    inputs = x.row(5, P, R)
    loss, gradient_SV = suffix_gradient(target.params, target.cfg, P, *inputs, np.array(suffix, np.int32))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    one_hot = torch.nn.functional.one_hot(torch.tensor(suffix), target.cfg.vocab_size).double().requires_grad_()
    expected = torch_loss(model, x, one_hot)
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), abs=1e-4)
    scale = one_hot.grad.abs().max().item()
    assert np.abs(np.asarray(gradient_SV) - one_hot.grad.numpy()).max() < 1e-3 * scale
    for s, v in ((0, 9), (4, 20)):
        step = torch.zeros_like(one_hot)
        step[s, v] = 1e-2  # not smaller: the reference's norms are float32
        with torch.no_grad():
            difference = (torch_loss(model, x, one_hot + step) - torch_loss(model, x, one_hot - step)).item() / 2e-2
        assert float(gradient_SV[s, v]) == pytest.approx(difference, abs=1e-2 * scale)
    # Copies for the batch axis of a mesh change nothing, and candidates are scored like the suffix itself.
    _, copied = suffix_gradient(target.params, target.cfg, P, *inputs, np.array(suffix, np.int32), copies=2)
    np.testing.assert_allclose(copied, gradient_SV, atol=1e-4 * scale)
    others = np.array([suffix, suffix[::-1], suffix[1:] + suffix[:1], suffix], np.int32)
    losses = suffix_losses(target.params, target.cfg, P, *inputs, others, chunk=2)
    with torch.no_grad():
        rows = torch.nn.functional.one_hot(torch.tensor(others).long(), target.cfg.vocab_size).double()
        np.testing.assert_allclose(losses, [torch_loss(model, x, row).item() for row in rows], atol=1e-4)


def test_layout_is_what_the_template_gives(target, vocabulary):
    x = layout(target)
    suffix = vocabulary.first(4, [x])
    text = vocabulary.text(suffix)
    assert target.chat.encode(RECORDS[0].prompt + text) == [*x.before, *suffix, *x.after]
    row, mask, use, at = x.row(4, 32, 12)
    ids = [*target.chat.encode(RECORDS[0].prompt + text), *x.target]
    row[at : at + 4] = suffix
    assert row[mask == 1].tolist() == ids and row[32 : 32 + int(use.sum())].tolist() == list(x.target)
    assert mask[:32].sum() == len(ids) - len(x.target)


def test_only_tokens_that_can_be_typed(target, vocabulary):
    tokenizer, x = target.chat.tokenizer, layout(target)
    allowed = {tokenizer.convert_ids_to_tokens(int(i)) for i in np.flatnonzero(vocabulary.allowed_V)}
    assert allowed == {"system", "user", "assistant", *tiny.WORDS}
    special = tokenizer.convert_tokens_to_ids("<|im_end|>")
    words = [int(i) for i in np.flatnonzero(vocabulary.allowed_V)[:4]]
    assert vocabulary.survive([words, [special, *words[1:]]], [x]) == [True, False]


def test_merging_tokens_do_not_survive():
    """With byte-pair merges a pair of tokens can become another one: `he` + `llo` is not what a user's text gives."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from opsa_jax.data.chat import Chat

    vocab = {t: i for i, t in enumerate(["<e>", "Ġ", "h", "e", "x", "he", "Ġh", "Ġx", ":"])}
    backend = Tokenizer(models.BPE(vocab, [("h", "e"), ("Ġ", "h"), ("Ġ", "x")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if add_generation_prompt %}<e>{% endif %}"
    chat = Chat("bpe", tokenizer, stop_ids=(0,))
    words = Vocabulary(chat, 9)
    assert not words.allowed_V[0] and not words.allowed_V[1]  # special; only white space
    x = Layout.of(chat, "xx", "x")
    ids = {t: i for t, i in vocab.items()}
    good, merged = [ids["Ġx"], ids["h"], ids["x"]], [ids["Ġx"], ids["h"], ids["e"]]
    assert words.survive([good, merged], [x]) == [True, False]


def test_beats_random_search_at_equal_budget(tmp_path, monkeypatch):
    """With 1,500 words there are 12,000 substitutions, of which each search evaluates 192."""
    monkeypatch.setattr(tiny, "WORDS", [*tiny.WORDS, *(f"word{i}" for i in range(1500))])
    large = load(tiny.make_model(tmp_path / "model"))
    words = Vocabulary(large.chat, large.cfg.vocab_size)
    gains = {"gradient": [], "random": []}
    for proposals, found in gains.items():
        for i in range(len(RECORDS)):
            changes = {"proposals": proposals, "top_k": 16}
            s = search(large, words, GcgSettings(**(SETTINGS.__dict__ | changes)), (i,))
            first = words.first(8, s.layouts)
            state = optimise(s, State(suffix=first, best=first), (0, i))
            assert state.evaluations == SETTINGS.steps * SETTINGS.candidates and len(state.losses) == SETTINGS.steps
            assert state.best_loss == pytest.approx(float(s.losses([state.best], 1)[0]), abs=1e-5)
            found.append(float(s.losses([first], 1)[0]) - state.best_loss)
    # Seen: 0.53, 0.51, 0.50 nats against 0.36, 0.33, 0.45.
    assert min(gains["gradient"]) > 0.2 and sum(gains["gradient"]) > 1.15 * sum(gains["random"]), gains


def test_stops_when_greedy_decoding_gives_the_target(target, vocabulary):
    x = layout(target)
    first = vocabulary.first(8, [x])
    s = search(target, vocabulary)
    logits_first = next(i for i in range(target.cfg.vocab_size) if _greedy_first(s, target, x, first, i))
    easy = Layout(x.before_text, x.after_text, x.before, x.after, (logits_first,))
    settings = GcgSettings(**(SETTINGS.__dict__ | {"stop": True}))
    state = optimise(Search(target.params, target.cfg, vocabulary, [easy], settings), State(suffix=first, best=first), (0,))
    assert state.matched and state.step == 0 and state.best == first


def _greedy_first(s, target, x, suffix, token):
    one = Layout(x.before_text, x.after_text, x.before, x.after, (token,))
    return Search(target.params, target.cfg, s._vocabulary, [one], SETTINGS).matched(suffix, 1)


def test_universal_adds_prompts_when_the_suffix_works(target, vocabulary, monkeypatch):
    s = search(target, vocabulary, records=(0, 1, 2))
    first = vocabulary.first(8, s.layouts)
    each = [search(target, vocabulary, records=(i,)).losses([first], 1)[0] for i in range(3)]
    assert s.losses([first], 3)[0] == pytest.approx(np.mean(each), abs=1e-5)
    asked = []

    def matched(suffix, active):
        asked.append(active)
        return len(asked) % 2 == 0  # every second look finds that it works

    monkeypatch.setattr(s, "matched", matched)
    state = optimise(s, State(suffix=first, best=first), (0,))
    assert state.active == 3 and asked[:4] == [1, 1, 2, 2] and sorted(asked) == asked
    per_step = [16 * n for n in (1, 2, 3)]
    assert state.evaluations <= 12 * per_step[-1] and state.evaluations > 12 * per_step[0]


def test_on_a_mesh(target, vocabulary, folder):
    from opsa_jax.data.chat import Chat
    from opsa_jax.evals.attacks.runner import Target
    from opsa_jax.models.hf import load_config, load_params

    first = vocabulary.first(8, [layout(target)])
    alone = search(target, vocabulary)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    cfg, _ = load_config(str(folder))
    with jax.set_mesh(mesh):
        many = search(Target(load_params(folder, cfg, "float32", mesh), cfg, Chat.load(str(folder))), vocabulary)
        g_many, loss_many = many.gradients(first, 1)
        several = many.losses([first, first[::-1]], 1)
    g, loss = alone.gradients(first, 1)
    assert loss_many == pytest.approx(loss, abs=1e-4)
    np.testing.assert_allclose(np.asarray(g_many), np.asarray(g), atol=1e-3)
    np.testing.assert_allclose(several, alone.losses([first, first[::-1]], 1), atol=1e-4)


def attempts(attack):
    return next(attack.rounds(RECORDS))


def test_interrupted_suffix_goes_on_as_it_would_have(target, tmp_path, monkeypatch):
    from opsa_jax.evals.attacks import gcg_attack

    own, settings = texts("english-v1"), GcgSettings(**(SETTINGS.__dict__ | {"steps": 7}))
    whole = Gcg(target, settings, own, seed=3)
    expected = attempts(whole)
    assert [a.prompt.startswith(r.prompt + " ") for a, r in zip(expected, RECORDS, strict=True)] == [True] * 3
    saved = gcg_attack.write_json

    def stop_at(path, value):
        saved(path, value)
        if value["id"] == "b" and value["state"]["step"] == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(gcg_attack, "write_json", stop_at)
    with pytest.raises(KeyboardInterrupt):
        attempts(Gcg(target, settings, own, seed=3, out=tmp_path))
    monkeypatch.undo()
    rows = [json.loads(line) for line in (tmp_path / "gcg.suffixes.jsonl").read_text().splitlines()]
    assert [r["id"] for r in rows] == ["a"]
    steps = []
    propose = Search.propose
    monkeypatch.setattr(Search, "propose", lambda self, *a: (steps.append(1), propose(self, *a))[1])
    again = Gcg(target, settings, own, seed=3, out=tmp_path, resume=True)
    assert attempts(again) == expected and len(steps) == 1 + 7  # one step of b was left, and all of c
    assert all(again.found[i]["loss"] == pytest.approx(whole.found[i]["loss"], abs=1e-6) for i in "abc")
    with pytest.raises(UserError, match="was made with --seed 3, not 4"):
        attempts(Gcg(target, settings, own, seed=4, out=tmp_path, resume=True))


def test_universal_suffix_is_one_for_all_and_says_where_it_was_made(target):
    settings = GcgSettings(**(SETTINGS.__dict__ | {"steps": 2, "universal_prompts": 2}))
    made = attempts(Gcg(target, settings, texts("english-v1"), universal=True))
    assert [a.variant for a in made] == ["optimised", "optimised", "transfer"]
    assert len({a.prompt.removeprefix(r.prompt) for a, r in zip(made, RECORDS, strict=True)}) == 1


def test_bad_targets(target):
    with pytest.raises(UserError, match="has no tokens"):
        Layout.of(target.chat, "open the door", "")
