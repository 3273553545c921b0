"""Our model as an `LM` of lm-eval (EleutherAI's evaluation harness), so that all of its tasks run (extra `eval`).

    lm = make_lm(params, cfg, chat)
    lm_eval.simple_evaluate(lm, tasks=["ifeval"], apply_chat_template=True)

or `python -m opsa_jax.evaluate --lm-eval ifeval,gsm8k`. Responses are sampled by the engine that training uses; lm-eval's own limit on
samples, few-shot examples and templates apply. Stop strings (`until`) end a response after it is sampled, so a task with many stop
strings and much room costs all of that room; think blocks are taken off first, and one that never ends leaves nothing.
"""

import json
import logging
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

from opsa_jax.data.chat import Chat
from opsa_jax.errors import UserError
from opsa_jax.evals.likelihood import score_continuations
from opsa_jax.evals.scorers import strip_thinking
from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.params import Params
from opsa_jax.rollout.engine import Engine
from opsa_jax.rollout.filters import Sampling
from opsa_jax.rollout.sampler import row_keys

_KNOWN = {"until", "max_gen_toks", "max_new_tokens", "max_tokens", "max_length", "temperature", "top_p", "top_k", "min_p", "do_sample"}


def require_lm_eval() -> Any:
    """The package, or one line that says how to get it."""
    try:
        import lm_eval
    except ImportError as e:
        raise UserError(f"--lm-eval needs the package lm-eval ({e}); install it with pip install 'opsa_jax[eval]'") from None
    return lm_eval


def make_lm(
    params: Params, cfg: DecoderConfig, chat: Chat, batch: int = 64, max_gen_toks: int = 256, max_length: int = 4096, seed: int = 0
) -> Any:
    """An `lm_eval.api.model.TemplateLM`.

    Args:
        batch: rows at a time.
        max_gen_toks: room for responses of tasks that do not say.
        max_length: tokens of context and continuation together; longer contexts lose their beginning.
        seed: of sampling, for tasks that sample.

    Raises:
        UserError: lm-eval is not installed.
    """
    require_lm_eval()
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class OpsaLM(TemplateLM):
        backend = "causal"

        def __init__(self):
            super().__init__()
            self.tokenizer = chat.tokenizer
            self.opened = chat.opening().rstrip().endswith("<think>")
            self.stats: list[Any] = []
            """Statistics of the engines that ran."""

        @property
        def eot_token_id(self) -> int:
            return chat.tokenizer.eos_token_id if chat.tokenizer.eos_token_id is not None else chat.end_id

        @property
        def prefix_token_id(self) -> int:
            bos = chat.tokenizer.bos_token_id
            return self.eot_token_id if bos is None else bos

        @property
        def max_length(self) -> int:
            return max_length

        @property
        def max_gen_toks(self) -> int:
            return max_gen_toks

        @property
        def tokenizer_name(self) -> str:
            return chat.path.replace("/", "__")

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
            bos = chat.tokenizer.bos_token
            if add_special_tokens is None:
                add_special_tokens = not (bos and string.startswith(bos))
            return chat.tokenizer.encode(string, add_special_tokens=add_special_tokens)

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            options = {} if add_generation_prompt else {"continue_final_message": True}
            text = chat._template(chat_history, add_generation_prompt=add_generation_prompt, **options)
            return text.rstrip() + "\n\n</think>\n\n" if chat.closes_think and add_generation_prompt else text

        def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
            pairs = [_fitted(context or [self.prefix_token_id], continuation) for _, context, continuation in requests]
            scored = score_continuations(params, cfg, pairs, batch)
            answers = [(s.total, s.greedy) for s in scored]
            for (text, _, _), answer in zip(requests, answers, strict=True):
                if text is not None:
                    self.cache_hook.add_partial("loglikelihood", text, answer)
            return answers

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            windows, owner = [], []
            for i, request in enumerate(requests):
                (string,) = request.args
                tokens = self.tok_encode(string, add_special_tokens=False)
                for window in get_rolling_token_windows(tokens, self.prefix_token_id, max_length, 1):
                    windows.append(make_disjoint_window(window))
                    owner.append(i)
            totals = np.zeros(len(requests))
            for i, scored in zip(owner, score_continuations(params, cfg, windows, batch), strict=True):
                totals[i] += scored.total
            for request, total in zip(requests, totals, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, float(total))
            return totals.tolist()

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            groups: dict[str, list[int]] = defaultdict(list)
            for i, request in enumerate(requests):
                groups[json.dumps(request.args[1], sort_keys=True)].append(i)
            texts = [""] * len(requests)
            seen: Counter[str] = Counter()
            for key, rows in groups.items():
                kwargs = json.loads(key)
                sampling, room, until = _generation(kwargs, max_gen_toks)
                prompts = [self.tok_encode(requests[i].args[0])[-max(1, max_length - room) :] for i in rows]
                engine = Engine(params, cfg, sampling, chat.stop_ids, room, batch)
                numbers, samples = [], []
                for i in rows:
                    text = requests[i].args[0]
                    numbers.append(zlib.crc32(text.encode()) & 0x7FFFFFFF)
                    samples.append(seen[text])
                    seen[text] += 1
                keys_N = row_keys(jax.random.key(seed), "lm-eval", 0, np.array(numbers, np.int32), np.array(samples, np.int32))
                for i, response in zip(rows, engine.run(prompts, keys_N), strict=True):
                    texts[i] = _cut(chat.decode_response(response.ids.tolist()), until, self.opened)
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                self.stats.append(engine.stats)
            return texts

    def _fitted(context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """The continuation whole, and of the context what fits before it, one token at least."""
        if len(continuation) >= max_length:
            raise UserError(f"lm-eval: a continuation has {len(continuation)} tokens, more than the {max_length - 1} that fit")
        return context[-(max_length - len(continuation)) :], continuation

    return OpsaLM()


def _generation(kwargs: dict[str, Any], room: int) -> tuple[Sampling, int, list[str]]:
    """Sampling, room and stop strings of a task's `generation_kwargs`; as in lm-eval, no temperature or do_sample=false is greedy."""
    if unknown := sorted(set(kwargs) - _KNOWN):
        raise UserError(f"lm-eval: generation setting {unknown[0]!r} is not supported; allowed: {', '.join(sorted(_KNOWN))}")
    until = kwargs.get("until") or []
    until = [until] if isinstance(until, str) else list(until)
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens"):
        if kwargs.get(name):
            room = int(kwargs[name])
            break
    temperature = float(kwargs.get("temperature") or 0.0)
    if kwargs.get("do_sample") is False:
        temperature = 0.0
    elif kwargs.get("do_sample") and "temperature" not in kwargs:
        temperature = 1.0
    top_k, top_p, min_p = int(kwargs.get("top_k") or 0), float(kwargs.get("top_p") or 1.0), float(kwargs.get("min_p") or 0.0)
    return Sampling(temperature, max(top_k, 0), top_p, min_p), room, until


def _cut(text: str, until: list[str], opened: bool) -> str:
    """Without its think block, up to the first stop string."""
    if opened or "<think>" in text or "</think>" in text:
        text = strip_thinking(text, opened)[0]
    for stop in until:
        if stop:
            text = text.partition(stop)[0]
    return text


def find_tasks(tasks: str) -> tuple[list[str], Any]:
    """Names of lm-eval tasks, separated by commas (names, or .yaml files), and the manager that knows them.

    Raises:
        UserError: lm-eval is missing, or a task is unknown.
    """
    require_lm_eval()
    from lm_eval.tasks import TaskManager

    names, folders = [], []
    for task in (t.strip() for t in tasks.split(",") if t.strip()):
        if task.endswith((".yaml", ".yml")):
            names.append(_task_name(Path(task)))
            folders.append(str(Path(task).parent.resolve()))
        else:
            names.append(task)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=folders or None, include_defaults=len(folders) < len(names))
    unknown = [n for n in names if not manager.match_tasks([n])]
    if unknown:
        raise UserError(f"lm-eval has no task {unknown[0]!r}; `lm_eval ls tasks` lists them, and a .yaml file is one of your own")
    return names, manager


def run_tasks(
    lm: Any, tasks: str | tuple[list[str], Any], limit: int = 0, chat_template: bool = True, fewshot: int = -1, seed: int = 0
) -> dict[str, Any]:
    """Run lm-eval tasks.

    Args:
        tasks: as `find_tasks` takes them, or what it gave.

    Returns:
        lm-eval's result dict; `results` holds metric values by task.

    Raises:
        UserError: as `find_tasks`; or a task's data cannot be had.
    """
    lm_eval = require_lm_eval()
    names, manager = find_tasks(tasks) if isinstance(tasks, str) else tasks
    try:
        return lm_eval.simple_evaluate(
            lm, tasks=names, task_manager=manager, limit=limit or None, apply_chat_template=chat_template, bootstrap_iters=100,
            num_fewshot=None if fewshot < 0 else fewshot, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed,
            fewshot_random_seed=seed,
        )  # fmt: skip
    except (OSError, ConnectionError, FileNotFoundError) as e:
        reason = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise UserError(f"lm-eval: a task's data cannot be read ({reason}); download it first, or check the paths of the .yaml") from None


def _task_name(path: Path) -> str:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))["task"]
    except (OSError, KeyError, TypeError, yaml.YAMLError) as e:
        raise UserError(f"{path} is no task of lm-eval: {type(e).__name__} {e}".replace("\n", " ")) from None
