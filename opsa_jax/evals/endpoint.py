"""A client for chat endpoints that speak the OpenAI protocol (`POST {url}/chat/completions`): hosted models, vLLM, llama.cpp and others.

Answers are kept in a file of JSON lines as they come, each under a hash of its request, so a killed run loses nothing that was paid for.
The key is read from an environment variable and is written nowhere.
"""

import hashlib
import http.client
import json
import os
import queue
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opsa_jax.errors import UserError

_RETRIED = frozenset({408, 409, 425, 429})  # and all of 5xx
_LONGEST_WAIT = 60.0
_LARGEST_BODY = 1 << 24


@dataclass(frozen=True)
class EndpointConfig:
    """Where a model is served, and how patiently it is asked."""

    url: str = ""
    """Base URL of an OpenAI-compatible endpoint, for example http://localhost:8000/v1."""
    model: str = ""
    """Name of the model there."""
    key_env: str = ""
    """Environment variable with the key, for example OPENAI_API_KEY; empty sends none."""
    timeout: float = 120.0
    """Seconds an answer may take."""
    retries: int = 6
    """Further attempts after rate limits, server errors, lost connections, timeouts and unreadable replies."""
    concurrency: int = 8
    """Requests under way at the same time."""
    temperature: float = 0.0
    """Sampling temperature of the endpoint."""
    max_tokens: int = 1024
    """Room for an answer, in tokens."""


@dataclass(frozen=True)
class Ask:
    """One request. `sample` tells repeated ones apart: it is sent as the seed and is part of the cache's key."""

    messages: tuple[Mapping[str, str], ...]
    sample: int = 0
    params: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the request body; they replace those of the config."""


@dataclass(frozen=True)
class Reply:
    text: str
    finished: bool
    """False where the endpoint cut the answer at max_tokens."""


class _Retry(Exception):
    """An attempt that may succeed later; `wait` is what the endpoint asked for, in seconds."""

    def __init__(self, why: str, wait: float = 0.0):
        super().__init__(why)
        self.wait = wait


class Endpoint:
    """Asks many questions at once, patiently.

    Args:
        cfg: where and how.
        cache: file of finished answers (JSON lines: key, text, finished); None keeps none. It is read once, here.
        backoff: seconds before the first further attempt; doubles with each, times a random factor in [0.5, 1.5).

    Raises:
        UserError: no URL or model, a named key that is not set, a number out of range, or a cache that cannot be read.
    """

    def __init__(self, cfg: EndpointConfig, cache: Path | None = None, backoff: float = 1.0):
        if not cfg.url.startswith(("http://", "https://")):
            raise UserError(f"endpoint URL {cfg.url!r}: must start with http:// or https://, for example http://localhost:8000/v1")
        if not cfg.model:
            raise UserError(f"endpoint {cfg.url}: name the model to ask for")
        if cfg.key_env and not os.environ.get(cfg.key_env):
            raise UserError(f"endpoint {cfg.url}: the environment variable {cfg.key_env}, which should hold its key, is not set")
        for name, ok in (("timeout", cfg.timeout > 0), ("retries", cfg.retries >= 0), ("concurrency", cfg.concurrency >= 1)):
            if not ok:
                raise UserError(f"endpoint {name} {getattr(cfg, name)}: must be {'0 or above' if name == 'retries' else 'above 0'}")
        self.cfg, self._cache, self._backoff = cfg, cache, backoff
        self._url = cfg.url.rstrip("/") + "/chat/completions"
        self._known = _read_cache(cache)
        self._lock, self._random = threading.Lock(), random.Random()
        # Redirects are refused: the key must not travel to another host.
        self._opener = urllib.request.build_opener(_NoRedirect)

    def ask(self, asks: Sequence[Ask], progress: Callable[[int, int], None] = lambda done, total: None) -> list[Reply]:
        """All replies, in order. `progress` is called with (finished, different requests) as they come, from this thread.

        Raises:
            UserError: the endpoint cannot be reached, rejects the key or the request, or replies rubbish to the last attempt. Replies
                that had come are in the cache.
        """
        keys = [self.key(a) for a in asks]
        missing = {k: a for k, a in zip(keys, asks, strict=True) if k not in self._known}
        total = len(set(keys))
        done = total - len(missing)
        progress(done, total)
        work: queue.SimpleQueue[tuple[str, Ask]] = queue.SimpleQueue()
        for item in missing.items():
            work.put(item)
        results: queue.SimpleQueue[tuple[str, Reply | Exception]] = queue.SimpleQueue()
        stop = threading.Event()
        # Daemons, so that neither an error nor an interrupt has to wait for requests under way.
        for _ in range(min(self.cfg.concurrency, len(missing))):
            threading.Thread(target=self._worker, args=(work, results, stop), daemon=True).start()
        try:
            for finished in range(1, len(missing) + 1):
                _, reply = results.get()
                if isinstance(reply, Exception):
                    kept = f"; {finished - 1 + done} finished answers are kept in {self._cache}, run again to go on" if self._cache else ""
                    raise UserError(f"endpoint {self.cfg.url} (model {self.cfg.model}): {reply}{kept}")
                progress(done + finished, total)
        finally:
            stop.set()
        return [self._known[k] for k in keys]

    def key(self, ask: Ask) -> str:
        """The cache's name for a request: a hash of URL and body."""
        return hashlib.sha256(json.dumps([self._url, self._body(ask)], sort_keys=True).encode()).hexdigest()

    def _body(self, ask: Ask) -> dict[str, Any]:
        mine = {"model": self.cfg.model, "temperature": self.cfg.temperature, "max_tokens": self.cfg.max_tokens, "seed": ask.sample}
        return mine | {"messages": [dict(m) for m in ask.messages]} | dict(ask.params)

    def _worker(self, work: queue.SimpleQueue, results: queue.SimpleQueue, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                key, ask = work.get_nowait()
            except queue.Empty:
                return
            try:
                reply = self._patiently(ask, stop)
                self._keep(key, reply)
            except Exception as e:  # whatever it is, the thread that asks must hear of it
                results.put((key, e))
                return
            results.put((key, reply))

    def _patiently(self, ask: Ask, stop: threading.Event) -> Reply:
        for attempt in range(self.cfg.retries + 1):
            try:
                return self._once(ask)
            except _Retry as e:
                last = e
            if attempt < self.cfg.retries:
                wait = max(self._backoff * 2**attempt * (0.5 + self._random.random()), last.wait)
                if stop.wait(min(wait, _LONGEST_WAIT)):
                    break
        raise UserError(f"{last} (after {attempt + 1} attempts)")

    def _once(self, ask: Ask) -> Reply:
        headers = {"Content-Type": "application/json", "User-Agent": "opsa_jax"}
        if self.cfg.key_env:
            headers["Authorization"] = f"Bearer {os.environ.get(self.cfg.key_env, '')}"
        request = urllib.request.Request(self._url, json.dumps(self._body(ask)).encode(), headers)
        try:
            with self._opener.open(request, timeout=self.cfg.timeout) as response:
                data = response.read(_LARGEST_BODY)
        except urllib.error.HTTPError as e:
            raise self._refused(e) from None
        except TimeoutError:
            raise _Retry(f"no answer within {self.cfg.timeout:g} s") from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as e:
            reason = getattr(e, "reason", e)
            slow = isinstance(reason, TimeoutError)
            raise _Retry(f"no answer within {self.cfg.timeout:g} s" if slow else f"cannot be reached: {reason}") from None
        return _parse(data)

    def _refused(self, e: urllib.error.HTTPError) -> Exception:
        detail = " ".join(e.read(400).decode(errors="replace").split())[:200]
        what = f"HTTP {e.code} {e.reason}" + (f": {detail}" if detail else "")
        if e.code in _RETRIED or e.code >= 500:
            return _Retry(what, _seconds(e.headers.get("Retry-After")))
        key = f"is the key in ${self.cfg.key_env} right?" if self.cfg.key_env else "does it need a key? name its variable in key-env"
        hint = f"; {key}" if e.code in (401, 403) else ""
        return UserError(what + hint)

    def _keep(self, key: str, reply: Reply) -> None:
        line = json.dumps({"key": key, "text": reply.text, "finished": reply.finished}, ensure_ascii=False) + "\n"
        with self._lock:
            self._known[key] = reply
            if self._cache is not None:
                self._cache.parent.mkdir(parents=True, exist_ok=True)
                with open(self._cache, "ab", buffering=0) as file:
                    file.write(line.encode())


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args, **kwargs):
        return None


def _seconds(header: str | None) -> float:
    """Retry-After in seconds; 0 for none or a date."""
    try:
        return max(float(header or 0), 0.0)
    except ValueError:
        return 0.0


def _parse(data: bytes) -> Reply:
    """The first choice of a completion. A null text, which some endpoints send with a `refusal`, is that refusal, or empty."""
    try:
        choice = json.loads(data)["choices"][0]
        message = choice["message"]
        text = message.get("content")
        text = (message.get("refusal") or "") if text is None else text
    except (ValueError, LookupError, TypeError, AttributeError):
        text = None
    if not isinstance(text, str):
        raise _Retry(f"reply is not a chat completion: {data[:80].decode(errors='replace')!r}")
    return Reply(text, choice.get("finish_reason") != "length")


def _read_cache(path: Path | None) -> dict[str, Reply]:
    """Finished answers by key. A last line that was cut by a kill is cut off, so that what is appended starts a line of its own."""
    if path is None or not path.exists():
        return {}
    try:
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(path, whole)
    except OSError as e:
        raise UserError(f"cache {path} of endpoint answers cannot be used: {e}") from None
    known = {}
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            row = json.loads(line)
            known[row["key"]] = Reply(row["text"], row["finished"])
        except (ValueError, TypeError, KeyError):
            raise UserError(f"cache {path}, line {number} is not an answer of an endpoint; mend or remove it") from None
    return known
