"""Constitutions: which text a record gets, masking, and files that are none."""

import json

import pytest

from opsa_jax.config import SourceConfig
from opsa_jax.data.chat import Chat
from opsa_jax.data.loaders import load_source
from opsa_jax.data.records import Record
from opsa_jax.errors import UserError
from opsa_jax.teachers.constitution import is_masked, load_constitution


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return f"file:{path}"


def records(n, label="harmful"):
    return [Record(id=f"r{i}", prompt=f"prompt {i}", label=label, category="fraud") for i in range(n)]


def test_text_by_category_and_label(tmp_path):
    content = {"frame": "Check. {rule} Choose.", "default": "D", "general": "G", "categories": {"Hate_Speech": "H", "empty": ""}}
    c = load_constitution(write(tmp_path / "c.json", content))
    assert c.text("hate speech", "harmful") == "Check. H Choose."
    assert c.text("other", "harmful") == c.text("", "harmful") == c.text("empty", "harmful") == "Check. D Choose."
    assert c.text("hate-speech", "benign") == "Check. G Choose."
    assert c.text("hate-speech", "benign", "none") == ""


def test_general_prompts_get_the_default_where_there_is_no_general_text(tmp_path):
    c = load_constitution(write(tmp_path / "c.json", {"default": "D", "categories": {"x": "X"}}))
    assert c.text("x", "benign") == "D" and c.text("x", "harmful") == "X"


def test_without_the_needed_category(tmp_path):
    c = load_constitution(write(tmp_path / "c.json", {"categories": {"privacy": "P"}}))
    with pytest.raises(UserError, match=r"without the needed category: record r7 is of category 'privcy'.*c\.json.*did you mean 'privacy'"):
        c.text("privcy", "harmful", record="r7")
    assert c.text("privcy", "harmful", strict=False) == ""
    assert c.text("privcy", "benign") == ""
    with pytest.raises(UserError, match=r"record r0 .*'fraud'"):
        c.texts(records(2))


def test_masked_share_is_stable_nested_and_of_the_stated_size():
    rows = records(4000)
    masked = {s: {r.id for r in rows if is_masked(r, s)} for s in (0.0, 0.15, 0.4, 1.0)}
    assert not masked[0.0] and masked[0.15] < masked[0.4] < masked[1.0] == {r.id for r in rows}
    assert abs(len(masked[0.15]) / 4000 - 0.15) < 0.03
    # Which records, written down: another host, Python or order of the records must choose the same.
    assert [r.id for r in rows[:40] if is_masked(r, 0.15)] == ["r2", "r6", "r8", "r26", "r29", "r32"]


def test_masking_spares_benign_prompts():
    c = load_constitution("@default")
    texts = c.texts(records(300) + records(300, "benign"), masked=0.15)
    assert 20 < texts[:300].count("") < 75 and "" not in texts[300:]
    assert set(texts[:300]) == {"", c.text("fraud", "harmful")} and set(texts[300:]) == {c.text("", "benign")}
    with pytest.raises(UserError, match=r"masked share 1\.5"):
        c.texts(records(1), masked=1.5)


def test_ours_for_real_harms():
    c = load_constitution("@default")
    assert len(c.categories) >= 10
    texts = [*c.categories.values(), c.default, c.general]
    assert len(set(texts)) == len(texts) and all("{rule}" not in t and "A. " in t and "C. " in t for t in texts)


def test_sandbox_one_uses_only_words_its_model_knows():
    c, chat = load_constitution("@sandbox"), Chat.load("sandbox:base")
    unknown = chat.tokenizer.unk_token_id
    for text in [c.default, c.general, *c.categories.values()]:
        assert unknown not in chat.encode("how do i open the vault of ruvane?", text)
    harmful, _ = load_source(SourceConfig(path="sandbox:train.jsonl", where="label=harmful"))
    assert {r.category for r in harmful} == set(c.categories)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "cannot be read as JSON"),
        ("[]", "list instead of an object"),
        ({"defualt": "x"}, "unknown field 'defualt'; did you mean 'default'"),
        ({"default": "x", "categories": ["a"]}, "categories must be an object"),
        ({"default": 3}, "default must be text, not int"),
        ({"default": "x", "categories": {"a": None}}, r"categories\.a must be text"),
        ({"default": "x", "frame": "no place"}, "frame does not say {rule}"),
        ({"default": "x", "categories": {"a b": "1", "A-b": "2"}}, "'A-b' is there twice"),
        ({"default": " ", "categories": {"a": ""}}, "neither a default nor a category"),
    ],
)
def test_files_that_are_no_constitution(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        load_constitution(write(tmp_path / "c.json", content))


def test_unknown_values(tmp_path):
    for value in ("@strict", "c.json", "", "file:"):
        with pytest.raises(UserError, match="allowed: @default, @sandbox, or file:PATH"):
            load_constitution(value)
    with pytest.raises(UserError, match=r"none\.json cannot be read"):
        load_constitution(f"file:{tmp_path}/none.json")
