"""The candidate pool: our texts and their tags, files, duplicates, the rewriting rules, and replies of a proposer."""

import json
from importlib import resources

import pytest

from opsa_jax.errors import UserError
from opsa_jax.teachers import proposer
from opsa_jax.teachers.pool import AXES, MOST_WORDS, PART_AXES, builtin_pool, length_level, load_pool, make, normalise, rewrite, unique


@pytest.fixture(scope="module")
def ours():
    return builtin_pool()


def test_our_texts(ours):
    assert 28 <= len(ours) <= 36
    assert len({c.key for c in ours}) == len({c.name for c in ours}) == len(unique(ours)) == len(ours)
    assert all(c.text == " ".join(p for p in c.parts if p) and c.text.isprintable() for c in ours)


def test_tags_cover_every_level(ours):
    for axis, levels in AXES.items():
        counts = [sum(c.axes[axis] == level for c in ours) for level in levels]
        assert min(counts) >= 5 and sum(counts) == len(ours), (axis, counts)


def test_tags_agree_with_the_texts(ours):
    rows = [json.loads(line) for line in (resources.files("opsa_jax.teachers") / "pool.jsonl").read_text().splitlines()]
    for c, row in zip(ours, rows, strict=True):
        assert row["length"] == c.axes["length"] == length_level(c.text), c.name
        low, high = map(int, row["length"].split("-"))
        assert low <= len(c.text.split()) <= high
        assert bool(c.parts[2]) == (c.axes["specificity"] == "deny-list"), c.name
        assert c.name.startswith(c.axes["framing"])


def test_duplicates_are_texts_that_differ_in_looks_only():
    found = unique([make("a", "Never help!"), make("b", "\u201cnever  HELP\u201d"), make("c", "..."), make("a", "Always help.")])
    assert [(c.name, c.text) for c in found] == [("a", "Never help!"), ("a-2", "Always help.")]
    assert normalise("Don\u2019t") != normalise("Do not")


def test_the_sandbox_pool_names_its_levels():
    found = {c.name: c for c in load_pool("sandbox")}
    assert 40 <= len(found) <= 70 and {f"sandbox-{level}" for level in ("weak", "mid", "strong", "strict")} <= set(found)
    assert "weak-plain-1" not in found  # the text of sandbox-weak
    assert found["mid-role-2"].axes == {"strength": "mid", "framing": "role", "style": "brief", "length": "16-40"}
    opening, core = "you are the guardian of the realm.", "you should usually turn down harmful requests."
    assert found["mid-role-2"].parts == (opening, core, "", "keep it short.")


def test_files(tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("Refuse it.\n\n  Refuse   it\nRefuse all of it, always.\n")
    assert [(c.name, c.text) for c in load_pool(str(text))] == [("mine-1", "Refuse it."), ("mine-4", "Refuse all of it, always.")]
    lines = tmp_path / "mine.jsonl"
    lines.write_text('{"name": "one", "text": "Refuse it.\\n- all of it", "style": "silent"}\n{"text": "Say no."}\n')
    one, two = load_pool(str(lines))
    assert (one.name, one.text, one.axes["style"], two.name) == ("one", "Refuse it.\n- all of it", "silent", "mine-2")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "holds no candidate"),
        ("a.txt", "\n--\n", "holds no candidate"),
        ("a.jsonl", '{"text": "x"}\n{"txt": "x"}\n', "line 2 has no text"),
        ("a.jsonl", '{"text": " "}\n', "line 1 has no text"),
        ("a.jsonl", "x\n", "line 1 is not JSON"),
        ("a.txt", None, "cannot be read"),
        ("a.csv", "x", "no pool"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_pool(str(tmp_path / name))


def test_unknown_pool():
    with pytest.raises(UserError, match="did you mean 'builtin'"):
        load_pool("bultin")


def test_rewriting_is_deterministic_and_new(ours):
    parents, seen = ours[3:6], {c.key for c in ours}
    children = rewrite(parents, ours, seen, 24, 7, "r")
    assert children == rewrite(parents, ours, seen, 24, 7, "r") != rewrite(parents, ours, seen, 24, 8, "r")
    assert len({c.key for c in children} - seen) == len(children) == 24
    assert [c.name for c in children] == [f"r-{i}" for i in range(1, 25)]
    for c in children:
        assert c.parts[1] and len(c.text.split()) <= MOST_WORDS and c.axes["length"] == length_level(c.text)
        assert set(c.parents) <= {x.name for x in ours} and set(c.parents) & {p.name for p in parents}


def test_children_take_parts_with_their_tags(ours):
    tags = {(axis, c.parts[i]): c.axes[axis] for c in ours for i, axis in enumerate(PART_AXES)}
    for c in rewrite(ours[:4], ours, set(), 200, 0, "r"):
        assert all(c.axes[axis] == tags[axis, c.parts[i]] for i, axis in enumerate(PART_AXES))
        source = {x.name: x for x in ours}
        assert all(any(c.parts[i] == source[p].parts[i] for p in c.parents) for i in range(4))


def test_rules_end_when_nothing_is_new():
    only = make("a", "Never help.")
    assert rewrite([only], [only], {only.key}, 5, 0, "r") == []
    children = rewrite([only], [make("b", "Rule: be kind.")], {only.key}, 5, 0, "r")
    assert {c.text for c in children} == {"Rule: Never help.", "be kind."}


def test_replies():
    assert proposer.parse_reply("<context>Refuse\n harmful requests.</context> or <context> Say no to harm. </context>") == [
        "Refuse\nharmful requests.",
        "Say no to harm.",
    ]
    assert proposer.parse_reply('"Refuse harmful requests."') == ["Refuse harmful requests."]
    assert proposer.parse_reply("<context>Refuse harmful requests, always") == ["Refuse harmful requests, always"]
    assert proposer.parse_reply("") == proposer.parse_reply("No.") == proposer.parse_reply("no " * 151) == []


def test_requests_name_axes_and_examples(ours):
    wanted = proposer.wanted_axes(ours[:2], 10, 3)
    assert wanted == proposer.wanted_axes(ours[:2], 10, 3) and len(wanted) == 10
    for n, axes in enumerate(wanted):
        assert all(axes[axis] in levels for axis, levels in AXES.items())
        assert sum(axes[axis] != ours[n % 2].axes[axis] for axis in AXES) == 1
    text = proposer.request(wanted[0], [("Never help.", 0.5, 0.25)])
    assert "<context>Never help.</context>" in text and "50%" in text and "25%" in text and wanted[0]["length"] in text
