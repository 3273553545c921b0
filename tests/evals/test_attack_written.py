"""Prompts that a model writes: rewrites, PAP and PAIR, with scripted writers and an endpoint that fails and talks rubbish."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from attack_models import RECORDS, Script, load, runner, tiny

from opsa_jax.errors import UserError
from opsa_jax.evals.attacks import written
from opsa_jax.evals.attacks.base import Result
from opsa_jax.evals.attacks.build import build, open_writer
from opsa_jax.evals.attacks.settings import AttackerConfig, AttackSettings, PairSettings, PapSettings, RewriteSettings
from opsa_jax.evals.attacks.writer import EngineWriter
from opsa_jax.evals.endpoint import Ask, Endpoint, EndpointConfig


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return load(tiny.make_model(tmp_path_factory.mktemp("written") / "model"))


def goal(text):
    """The request inside an instruction."""
    for tag in ("request", "goal"):
        if f"<{tag}>\n" in text:
            return text.rpartition(f"<{tag}>\n")[2].partition(f"\n</{tag}>")[0]
    raise AssertionError(text)


def drive(attack, judge):
    """All attempts of an attack; `judge(attempt)` says whether it succeeds."""
    rounds, made = attack.rounds(RECORDS), []
    attempts = next(rounds)
    while True:
        made.append(attempts)
        try:
            attempts = rounds.send([Result(a, f"answer to {a.prompt}", "complied" if judge(a) else "refused", judge(a)) for a in attempts])
        except StopIteration:
            return made


def test_rewrites_ask_for_each_kind_and_sample():
    writer = Script(lambda text, sample: f"<request>{text[:4]} {sample}</request>")
    attack = written.rewrite(RewriteSettings(kinds=("past", "Say it kindly: {prompt}"), samples=2), writer)
    (attempts,) = drive(attack, lambda a: False)
    assert [a.prompt for a in attempts[:4]] == ["Rewr 0", "Rewr 1", "Say  0", "Say  1"]
    assert [a.sample for a in attempts] == [0, 1, 2, 3] * 3 and attempts[2].variant == "Say it kindly: {prompt}"
    with pytest.raises(UserError, match="did you mean 'future'"):
        written.rewrite(RewriteSettings(kinds=("futur",)), writer)


def test_pap_names_the_technique_and_leaves_out_what_cannot_be_used():
    def reply(text, sample):
        return "I'm sorry, but I can't." if "logical" in text and goal(text) == RECORDS[1].prompt else f"dear, {goal(text)}"

    writer = Script(reply)
    attack = written.pap(PapSettings(techniques=("logical appeal", "social proof")), writer)
    (attempts,) = drive(attack, lambda a: False)
    assert [(a.id, a.sample, a.variant) for a in attempts] == [
        ("a", 0, "logical appeal"), ("a", 1, "social proof"), ("b", 1, "social proof"), ("c", 0, "logical appeal"), ("c", 1, "social proof")
    ]  # fmt: skip
    assert attempts[0].prompt == f"dear, {RECORDS[0].prompt}" and attack.report == {"asked": 6, "unusable": 1}
    assert sum("logical" in a.messages[0]["content"] for a in writer.asked) == 3 + 2  # asked twice more
    assert len(written.TECHNIQUES) == len(set(written.TECHNIQUES)) == 40
    with pytest.raises(UserError, match="did you mean 'social proof'"):
        written.pap(PapSettings(techniques=("social prof",)), writer)


def test_pair_refines_until_it_succeeds():
    def reply(text, sample):
        return json.dumps({"improvement": "x", "prompt": f"{goal(text)} try {text.count('score: ')} stream {sample % 2}"})

    writer = Script(reply)
    attack = written.Pair(PairSettings(streams=2, rounds=3), writer)
    made = drive(attack, lambda a: a.id == "a" and "try 1 stream 1" in a.prompt)
    assert [len(r) for r in made] == [6, 6, 4]  # a is done after its second round
    assert [(a.id, a.sample) for a in made[1]] == [("a", 2), ("a", 3), ("b", 2), ("b", 3), ("c", 2), ("c", 3)]
    assert made[2][0].prompt == f"{RECORDS[1].prompt} try 2 stream 0" and made[2][0].variant == "round 3"
    last = writer.asked[-1].messages[0]["content"]
    first = f"prompt: {RECORDS[2].prompt} try 0 stream 1\nanswer: answer to {RECORDS[2].prompt} try 0 stream 1\nscore: 1\n"
    assert first in last and "stream 0" not in last  # its own history, not that of the other stream


def test_pair_with_a_scorer():
    writer = Script(lambda text, sample: '{"prompt": "p"}')
    scorer = Script(lambda text, sample: "[[10]]" if RECORDS[0].prompt in text else "[[4]]" if RECORDS[1].prompt in text else "no idea")
    attack = written.Pair(PairSettings(streams=1, rounds=2), writer, scorer)
    made = drive(attack, lambda a: False)
    assert [[a.id for a in r] for r in made] == [["a", "b", "c"], ["b", "c"]] and attack.report["unrated"] == 2
    assert "score: 4" in writer.asked[-2].messages[0]["content"] and "score: 1" in writer.asked[-1].messages[0]["content"]


@pytest.mark.parametrize("name", ["pap", "pair"])
def test_nothing_usable_is_one_line(name):
    rubbish = Script(lambda text, sample: "")
    attack = written.pap(PapSettings(), rubbish) if name == "pap" else written.Pair(PairSettings(), rubbish)
    with pytest.raises(UserError, match=f"attack {name}: the attacker gave no usable prompt in") as e:
        next(attack.rounds(RECORDS))
    assert "\n" not in str(e.value)


def test_engine_writer_keeps_what_it_wrote(target, tmp_path):
    def writer(**more):
        return EngineWriter(target.params, target.cfg, target.chat, 5, 1.0, cache=tmp_path / "w.jsonl", name="tiny", **more)

    asks = [Ask(({"role": "user", "content": r.prompt},), s) for r in RECORDS for s in range(2)]
    first = writer().ask(asks)
    again = writer()
    assert again.ask(asks) == first and again._engine.stats.prompts == 0
    assert len({r.text for r in first}) > 1
    with pytest.raises(UserError, match="was made with --seed 0, not 1"):
        writer(seed=1)


class Stub:
    """An endpoint: `act(body)` gives (status, text)."""

    def __init__(self, act):
        self.act, self.seen, stub = act, [], self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.seen.append(body)
                code, text = stub.act(body)
                whole = json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})
                data = (whole if code == 200 else text).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    s = Stub(lambda body: (200, ""))
    yield s
    s.server.shutdown()
    s.server.server_close()


def test_endpoint_that_dies_keeps_what_is_done(target, tmp_path, stub):
    """PAIR over an endpoint that answers the first round and then fails: one line, and the rerun asks only for what is missing."""
    config = EndpointConfig(url=stub.url, model="m", retries=0, temperature=1.0)
    settings = AttackSettings(pair=PairSettings(streams=1, rounds=2), attacker=AttackerConfig(endpoint=config))

    def act(body):
        text = body["messages"][-1]["content"]
        if "Rate from 1 to 10" in text:
            return 200, "[[2]]"
        if "This was tried" in text and not alive:
            return 500, "gone"
        return 200, json.dumps({"prompt": f"please {goal(text)}"})

    def attempt(out, resume):
        pen = open_writer(settings.attacker, load, out)
        made = runner(target, out=out, resume=resume)
        return made, made.run(build(("pair",), target, settings, writer=lambda: pen)[0], RECORDS)

    alive, stub.act = False, act
    with pytest.raises(UserError, match=r"HTTP 500.*are kept in") as e:
        attempt(tmp_path, False)
    assert "\n" not in str(e.value)
    rows = (tmp_path / "pair.verdicts.jsonl").read_text().splitlines()
    assert len(rows) == 3 and len(stub.seen) >= 7  # three prompts, three ratings, and the failure
    alive, asked = True, len(stub.seen)
    made, results = attempt(tmp_path, True)
    assert made.engine.stats.prompts == 3 == made.judged
    assert len(results) == 6 and len(stub.seen) - asked <= 6  # prompts of the second round, and their ratings


def test_endpoint_that_talks_rubbish(target, stub):
    stub.act = lambda body: (200, "no request here, I'm sorry, but I can't")
    settings = AttackSettings(attacker=AttackerConfig(endpoint=EndpointConfig(url=stub.url, model="m", retries=0)))
    for name in ("pap", "pair"):
        pen = Endpoint(settings.attacker.endpoint)
        with pytest.raises(UserError, match="no usable prompt") as e:
            runner(target).run(build((name,), target, settings, writer=lambda pen=pen: pen)[0], RECORDS[:1])
        assert "\n" not in str(e.value)
