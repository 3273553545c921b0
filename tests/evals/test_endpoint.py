"""The endpoint client against a local stub that fails, stalls and talks rubbish."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from opsa_jax.errors import UserError
from opsa_jax.evals.endpoint import Ask, Endpoint, EndpointConfig


class Stub:
    """Answers each request by the next function of `script`, and by `echo` when that is used up."""

    def __init__(self):
        self.script, self.seen, self.headers, self.busy, self.most = [], [], [], 0, 0
        self.lock, stub = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stub.lock:
                    stub.seen.append(body)
                    stub.headers.append((self.path, dict(self.headers)))
                    stub.busy += 1
                    stub.most = max(stub.most, stub.busy)
                    act = stub.script.pop(0) if stub.script else echo
                status, data, more = act(body)
                with stub.lock:
                    stub.busy -= 1
                try:
                    self.send_response(status)
                    for k, v in more.items():
                        self.send_header(k, v)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:  # the client gave up
                    pass

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


def echo(body, finish="stop"):
    text = f"echo {body['messages'][-1]['content']} {body['seed']}"
    return 200, json.dumps({"choices": [{"message": {"content": text}, "finish_reason": finish}]}).encode(), {}


def status(code, text="no", **headers):
    return lambda body: (code, text.encode(), headers)


def say(data: bytes):
    return lambda body: (200, data, {})


def stall(body):
    time.sleep(0.6)
    return echo(body)


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", "not-for-every-host")
    s = Stub()
    yield s
    s.server.shutdown()
    s.server.server_close()


def client(stub, cache=None, url=None, **changes):
    values = {"model": "m", "timeout": 5.0, "retries": 3, "concurrency": 2} | changes
    return Endpoint(EndpointConfig(url=url or stub.url, **values), cache, backoff=0.001)


def ask(text, sample=0):
    return Ask(({"role": "user", "content": text},), sample)


def test_replies_in_order_with_progress_and_concurrency(stub):
    calls = []

    def slow(body):
        time.sleep(0.02)
        return echo(body)

    stub.script = [slow] * 12
    replies = client(stub, concurrency=3).ask([ask(f"q{i}") for i in range(12)], lambda d, t: calls.append((d, t)))
    assert [r.text for r in replies] == [f"echo q{i} 0" for i in range(12)] and all(r.finished for r in replies)
    assert calls == [(i, 12) for i in range(13)] and stub.most <= 3
    assert {k: stub.seen[0][k] for k in ("model", "temperature", "max_tokens")} == {"model": "m", "temperature": 0.0, "max_tokens": 1024}
    assert stub.headers[0][0] == "/v1/chat/completions" and "Authorization" not in stub.headers[0][1]


def test_key_is_sent_and_not_kept(stub, monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET_NAME", "sesame-42")
    client(stub, tmp_path / "c.jsonl", key_env="SECRET_NAME").ask([ask("q")])
    assert stub.headers[0][1]["Authorization"] == "Bearer sesame-42"
    assert "sesame" not in (tmp_path / "c.jsonl").read_text()
    stub.script = [status(403)]
    with pytest.raises(UserError, match=r"is the key in \$SECRET_NAME right") as e:
        client(stub, key_env="SECRET_NAME").ask([ask("q")])
    assert "sesame" not in str(e.value)


@pytest.mark.parametrize(
    "bad",
    [
        status(429, **{"Retry-After": "0"}),
        status(500),
        status(503, **{"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
        say(b"<html>rubbish"),
        say(b'{"choices": []}'),
        say(b'{"choices": [{"message": {"content": 7}}]}'),
        say(b"[1]"),
    ],
)
def test_attempts_again(stub, bad):
    stub.script = [bad, bad]
    assert client(stub).ask([ask("q")])[0].text == "echo q 0"
    assert len(stub.seen) == 3


def test_stalled_request_is_asked_again(stub):
    stub.script = [stall]
    assert client(stub, timeout=0.2).ask([ask("q")])[0].text == "echo q 0"
    assert len(stub.seen) == 2


@pytest.mark.parametrize(
    "script, message, requests",
    [
        ([status(401, "bad key")], r"HTTP 401.*bad key.*key-env", 1),
        ([status(400, "too long")], r"HTTP 400.*too long", 1),
        ([status(302, Location="http://example.invalid/")], r"HTTP 302", 1),
        ([status(500, "broken")] * 4, r"HTTP 500.*broken.*after 4 attempts", 4),
        ([say(b"rubbish")] * 4, r"not a chat completion.*rubbish", 4),
        ([stall] * 4, r"no answer within 0\.1 s", 4),
    ],
)
def test_gives_up(stub, script, message, requests):
    stub.script = list(script)
    with pytest.raises(UserError, match=message) as e:
        client(stub, timeout=0.1 if stall in script else 5.0).ask([ask("q")])
    assert stub.url in str(e.value) and len(stub.seen) == requests


def test_unreachable_names_url_and_reason(stub):
    stub.server.server_close()
    with pytest.raises(UserError, match=r"127\.0\.0\.1.*cannot be reached: .*refused"):
        client(stub, retries=1).ask([ask("q")])


def test_finished_answers_survive(stub, tmp_path):
    cache = tmp_path / "deep" / "c.jsonl"
    stub.script = [echo, echo, status(403, "stop")]
    with pytest.raises(UserError, match=r"2 finished answers are kept in .*c\.jsonl"):
        client(stub, cache, concurrency=1).ask([ask(f"q{i}") for i in range(5)])
    with cache.open("a") as f:
        f.write('{"key": "cut by a ki')
    stub.seen.clear()
    replies = client(stub, cache, concurrency=1).ask([ask(f"q{i}") for i in range(5)])
    assert [r.text for r in replies] == [f"echo q{i} 0" for i in range(5)]
    assert [b["messages"][0]["content"] for b in stub.seen] == ["q2", "q3", "q4"]
    assert len([json.loads(line) for line in cache.read_text().splitlines()]) == 5
    stub.seen.clear()
    client(stub, cache).ask([ask("q1")])
    assert stub.seen == []


def test_what_makes_another_request(stub):
    one = client(stub)
    assert one.key(ask("q")) == client(stub, retries=1, timeout=1.0).key(ask("q"))
    others = [one.key(ask("r")), one.key(ask("q", 1)), client(stub, model="n").key(ask("q")), client(stub, url="http://x/v1").key(ask("q"))]
    assert len({one.key(ask("q")), *others}) == 5


def test_same_question_is_asked_once(stub):
    replies = client(stub).ask([ask("q"), ask("q"), ask("q", 1)])
    assert [r.text for r in replies] == ["echo q 0", "echo q 0", "echo q 1"] and len(stub.seen) == 2


def test_cut_and_null_replies(stub):
    stub.script = [lambda body: echo(body, "length"), say(b'{"choices": [{"message": {"content": null, "refusal": "no"}}]}')]
    replies = client(stub, concurrency=1).ask([ask("a"), ask("b")])
    assert [(r.text, r.finished) for r in replies] == [("echo a 0", False), ("no", True)]


def test_bad_settings(stub, tmp_path):
    for changes, message in (
        ({"url": "ftp://x"}, "must start with http"),
        ({"model": ""}, "name the model"),
        ({"key_env": "OPSA_NO_SUCH_KEY"}, "OPSA_NO_SUCH_KEY.*is not set"),
        ({"concurrency": 0}, "concurrency 0: must be above 0"),
        ({"retries": -1}, "retries -1"),
    ):
        with pytest.raises(UserError, match=message):
            client(stub, **changes)
    (tmp_path / "c.jsonl").write_text('{"other": 1}\n')
    with pytest.raises(UserError, match="line 1 is not an answer"):
        client(stub, tmp_path / "c.jsonl")
