"""The first response token sits in the same place for student and teacher, and every other check before compilation."""

import dataclasses
import json

import pytest
import tiny_chat

from opsa_jax.data.chat import Chat, left_pad, preflight
from opsa_jax.data.pipeline import encode_all
from opsa_jax.data.records import Record
from opsa_jax.errors import UserError

CONTEXTS = {"harmful": "This request is harmful. Refuse, briefly.", "benign": ""}
RECORDS = [
    Record(str(i), f"How do I open the vault number {i}?{' now' * i}", ("harmful", "benign")[i % 2], source="s.jsonl") for i in range(4)
]
KINDS = list(tiny_chat.TEMPLATES)


def encoded(chat, placement="system", teacher_chat=None):
    return encode_all(RECORDS, chat, lambda r: CONTEXTS[r.label], placement, teacher_chat)


def error(*args, **kwargs) -> str:
    with pytest.raises(UserError) as e:
        preflight(*args, **kwargs)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("placement", ["system", "user"])
@pytest.mark.parametrize("thinking", ["auto", "on", "off"])
@pytest.mark.parametrize("kind", KINDS)
def test_response_begins_at_one_column_for_both(tmp_path, kind, thinking, placement):
    chat = tiny_chat.load(tmp_path, kind, thinking=thinking)
    examples = encoded(chat, placement)
    report = preflight(chat, chat, [examples], 1000)
    opening = chat.tokenizer(report.opening, add_special_tokens=False)["input_ids"]
    assert len(opening) >= 2
    for e in examples:
        assert e.prompt_ids[-len(opening) :].tolist() == e.teacher_ids[-len(opening) :].tolist() == opening
        assert (CONTEXTS["harmful"] in chat.decode(e.teacher_ids)) == (e.record.label == "harmful")
        assert CONTEXTS["harmful"] not in chat.decode(e.prompt_ids)
    # Left-padded to their widths, the sampled ids are appended as they are: no response is ever tokenised.
    response = [11, 12, 13]
    for rows, width in (([e.prompt_ids for e in examples], report.prompt_width), ([e.teacher_ids for e in examples], report.teacher_width)):
        ids, mask = left_pad(rows, width, chat.pad_id)
        assert max(map(len, rows)) == width and mask[:, -1].all()
        view = [[*row, *response] for row in ids.tolist()]
        assert all(row[width - len(opening) :] == opening + response for row in view)
    widths = f"{report.prompt_width} tokens, {report.teacher_width} for the teacher"
    assert str(report).startswith(f"4 prompts of up to {widths}; 0 too long, left out\nresponses begin after {report.opening!r} and end")
    assert report.skipped == 0 and report.stop_ids == chat.stop_ids and report.sources == [examples]


@pytest.mark.parametrize("kind", KINDS)
def test_templates_that_strip_thoughts_only_warn(tmp_path, kind):
    chat = tiny_chat.load(tmp_path, kind)
    warnings = preflight(chat, chat, [encoded(chat)], 1000).warnings
    assert [("leaves the think block" in w) for w in warnings] == ([True] if kind == "r1" else [])
    off = tiny_chat.load(tmp_path, "llama3", thinking="off")
    assert "has no reasoning switch: thinking=off changes nothing" in preflight(off, off, [encoded(off)], 1000).warnings[0]


def test_a_template_that_rewrites_the_prompt_is_refused(tmp_path):
    chat = tiny_chat.load(tmp_path, "llama3", tiny_chat.LLAMA3.replace("{{- bos_token }}", "{{- bos_token ~ messages|length }}"))
    assert "rewrites the prompt once it is answered" in error(chat, chat, [encoded(chat)], 1000)


def test_prompts_that_end_differently(tmp_path):
    on, off = (tiny_chat.load(tmp_path / t, "qwen3", thinking=t) for t in ("on", "off"))
    message = error(on, off, [encoded(on, teacher_chat=off)], 1000)
    assert message.startswith("prompt '0' of s.jsonl ends with '<|im_start|>assistant\\n' for the student and with ")
    assert message.endswith("give both the same chat template and the same --model.thinking")
    assert preflight(off, off, [encoded(off)], 1000).opening.endswith("</think>\n\n")


def test_a_teacher_with_other_tokens(tmp_path):
    student = tiny_chat.load(tmp_path / "s", "qwen3")
    tiny_chat.save(tmp_path / "t", "qwen3")
    file = tmp_path / "t" / "tokenizer.json"
    file.write_text(file.read_text().replace("</think>", "</thought>"))
    teacher = Chat.load(str(tmp_path / "t"))
    assert (
        "token '</think>' has id" in (message := error(student, teacher, [encoded(student)], 1000)) and "none for the teacher" in message
    )


def test_ids_must_fit_the_embedding(tmp_path):
    chat = tiny_chat.load(tmp_path, "qwen3")
    top = max(int(max(e.teacher_ids.max(), e.prompt_ids.max())) for e in encoded(chat))
    assert preflight(chat, chat, [encoded(chat)], top + 1)
    assert f"has id {top}, but the model has only {top} embedding rows" in error(chat, chat, [encoded(chat)], top)
    unknown, none = (dataclasses.replace(chat, stop_ids=ids) for ids in ((5000, 2), ()))
    assert "token 'unnamed' of" in error(unknown, unknown, [encoded(chat)], 1000)
    assert "names no token that ends a response; set eos_token" in error(none, none, [encoded(chat)], 1000)


def test_no_stop_token_anywhere(tmp_path):
    tiny_chat.save(tmp_path, "qwen3", tiny_chat.QWEN3.replace("<|im_end|>", ""))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "eos_token"}))
    assert Chat.load(str(tmp_path)).stop_ids == ()


@pytest.mark.parametrize("room", ["prompt_room", "teacher_room"])
def test_long_prompts(tmp_path, room):
    chat = tiny_chat.load(tmp_path, "qwen3")
    examples = encoded(chat)
    lengths = [len(e.prompt_ids if room == "prompt_room" else e.teacher_ids) for e in examples]
    limit = sorted(lengths)[1]
    flag = "--data.max-prompt-tokens" if room == "prompt_room" else "--data.max-teacher-prompt-tokens"
    first = next(i for i, n in enumerate(lengths) if n > limit)
    message = error(chat, chat, [examples], 1000, **{room: limit})
    assert message.startswith(f"prompt '{first}' of s.jsonl has {lengths[first]} tokens, more than {flag} {limit}; raise it")
    report = preflight(chat, chat, [examples], 1000, long_prompts="skip", **{room: limit})
    assert report.skipped == sum(n > limit for n in lengths) > 0
    assert [e.id for e in report.sources[0]] == [e.id for e, n in zip(examples, lengths) if n <= limit]
    assert (report.prompt_width if room == "prompt_room" else report.teacher_width) == limit
    assert "source s.jsonl has no prompt that fits" in error(chat, chat, [examples], 1000, long_prompts="skip", **{room: 3})


def test_nothing_to_train_on(tmp_path):
    chat = tiny_chat.load(tmp_path, "qwen3")
    assert "there are no prompts" in error(chat, chat, [], 1000)
    assert "a source has no prompt that fits" in error(chat, chat, [encoded(chat), []], 1000)
