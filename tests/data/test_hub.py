"""Hub datasets without a hub: local folders laid out like one, a fake client, and the cache of an earlier run."""

import json

import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from opsa_jax.config import SourceConfig
from opsa_jax.data.hub import split_files
from opsa_jax.data.loaders import load_source
from opsa_jax.errors import UserError

CARD = """---
configs:
- config_name: {first}
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: [main/held.csv]
- config_name: hard
  data_files: hard/*.jsonl
---
# A set
"""


def fill(folder, *names, card=None):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"prompt": name, "label": "benign"}) + "\n")
    if card:
        (folder / "README.md").write_text(card)
    return str(folder)


def chosen(folder, split="train", config=""):
    return [p.relative_to(folder).as_posix() for p in split_files(f"{folder}{config}", split)]


def error(name, split="train"):
    with pytest.raises(UserError) as e:
        split_files(name, split)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_splits_by_file_name(tmp_path):
    shards = ("data/train-00001-of-00002.jsonl", "data/train-00000-of-00002.jsonl")
    name = fill(tmp_path, *shards, "data/test-0.jsonl", "training_notes.jsonl", "pretrain.jsonl")
    assert chosen(name) == ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]
    assert chosen(name, "test") == ["data/test-0.jsonl"]
    records, _ = load_source(SourceConfig(f"hf:{name}"))
    assert [(r.id, r.prompt) for r in records] == [("0", "data/train-00000-of-00002.jsonl"), ("1", "data/train-00001-of-00002.jsonl")]
    assert "no readable file for split 'validation'; its data files: data/test-0.jsonl" in error(name, "validation")


def test_one_format_is_read_and_a_set_without_splits_is_train(tmp_path):
    name = fill(tmp_path, "everything.jsonl", "everything.csv", "notes.txt")
    assert chosen(name) == ["everything.jsonl"]
    assert "no readable file for split 'test'" in error(name, "test")
    other = fill(tmp_path / "other", "test.jsonl", "more.jsonl")
    assert "no readable file for split 'train'; its data files: more.jsonl, test.jsonl" in error(other)


def test_the_card_decides(tmp_path):
    files = ("main/train-0.jsonl", "main/held.csv", "hard/train.jsonl", "hard/b.jsonl")
    name = fill(tmp_path, *files, card=CARD.format(first="default"))
    assert chosen(name) == ["main/train-0.jsonl"] and chosen(name, "test") == ["main/held.csv"]
    assert chosen(name, config=":hard") == ["hard/b.jsonl", "hard/train.jsonl"]
    assert "has no split 'dev'; allowed: train, test" in error(name, "dev")
    assert "has no configuration 'soft'; allowed: default, hard" in error(f"{name}:soft")
    fill(tmp_path, card=CARD.format(first="main"))
    assert "has several configurations (main, hard); write hf:" in error(name)


def test_hub_files_are_listed_then_only_the_split_is_downloaded(tmp_path, monkeypatch):
    fill(tmp_path, "main/train-0.jsonl", "main/held.csv", card=CARD.format(first="default"))
    asked = []
    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_files", lambda self, name, repo_type: ["README.md", "main/train-0.jsonl", "main/held.csv"]
    )
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, repo_type, allow_patterns: asked.append(allow_patterns) or str(tmp_path)
    )
    assert split_files("org/set", "train") == [tmp_path / "main/train-0.jsonl"]
    assert asked == [["README.md"], ["main/train-0.jsonl"]]


def test_offline_takes_what_an_earlier_run_left(tmp_path, monkeypatch):
    fill(tmp_path, "train.jsonl")

    def partly_there(*args, **kwargs):
        e = LocalEntryNotFoundError("incomplete")
        e.snapshot_path = str(tmp_path)
        raise e

    monkeypatch.setattr(huggingface_hub, "snapshot_download", partly_there)
    assert split_files("org/set", "train") == [tmp_path / "train.jsonl"]


def test_hub_errors_are_one_line(monkeypatch):
    assert error("org/set-that-is-not-cached").startswith("hf:org/set-that-is-not-cached is not in the cache and the hub cannot be reached")
    assert "neither a local folder nor a hub name" in error("runs/no/such/folder")

    def raising(kind):
        def listing(self, name, repo_type):
            raise kind.__new__(kind)

        return listing

    for kind, says in {
        "GatedRepoError": "is gated: accept its terms",
        "RepositoryNotFoundError": "no such dataset, or a private one",
    }.items():
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", raising(getattr(huggingface_hub.errors, kind)))
        assert says in error("org/set")
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", raising(HFValidationError))
    assert "neither a local folder" in error("org/set")
