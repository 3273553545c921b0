"""Import and export of checkpoint folders: bits, keys, shards, meshes, and what a user can get wrong."""

import json
import shutil
import socket
import struct
import subprocess
import sys

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_hf import batch, imported, one_device, torch_model
from transformers import AutoModelForCausalLM

from opsa_jax.config import MeshConfig
from opsa_jax.errors import UserError
from opsa_jax.models import tensors
from opsa_jax.models.config import to_hf
from opsa_jax.models.hf import checkpoint_dtype, fetch, load_config, load_params, save_params
from opsa_jax.parallel.mesh import make_mesh
from opsa_jax.parallel.rules import named


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untied")
    torch_model("qwen2").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied")
    torch_model("qwen3-tied").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    torch_model("qwen3-moe").save_pretrained(folder)
    return folder


@pytest.fixture
def broken(untied, tmp_path):
    """A copy to damage."""
    return shutil.copytree(untied, tmp_path / "broken")


def edit(folder, change):
    """Rewrite model.safetensors after `change(dict of tensors)`."""
    arrays = load_file(folder / "model.safetensors")
    change(arrays)
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})


def import_error(folder) -> str:
    with pytest.raises(UserError) as error:
        imported(folder)
    return str(error.value)


def equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y))


# Export


@pytest.mark.parametrize("which", ["tied", "untied", "experts"])
def test_export_is_what_transformers_writes(which, request, tmp_path):
    source = request.getfixturevalue(which)
    params, cfg = imported(source)
    _, raw = load_config(str(source))
    save_params(params, cfg, tmp_path / "out", "float32", raw)
    theirs, ours = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert theirs.keys() == ours.keys()
    for key in theirs:
        assert np.array_equal(theirs[key], ours[key]), key
    tokens, _ = batch()
    models = [AutoModelForCausalLM.from_pretrained(f) for f in (source, tmp_path / "out")]
    logits = [m.eval()(torch.from_numpy(tokens)).logits for m in models]
    assert torch.equal(*logits)


def test_config_written_from_our_fields_loads_in_transformers(untied, tmp_path):
    params, cfg = imported(untied)
    save_params(params, cfg, tmp_path / "out", "float32")
    theirs, ours = (AutoModelForCausalLM.from_pretrained(f).eval() for f in (untied, tmp_path / "out"))
    tokens, _ = batch()
    assert torch.equal(theirs(torch.from_numpy(tokens)).logits, ours(torch.from_numpy(tokens)).logits)
    assert ours.dtype == torch.float32


def test_sharded_bfloat16_round_trip(untied, tmp_path):
    """bfloat16 is kept, the shards respect their limit, and both libraries read them."""
    params, cfg = imported(untied, "bfloat16")
    save_params(params, cfg, tmp_path / "out", "bfloat16", max_shard_bytes=10_000)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(shards) > 2 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all(sum(x.nbytes for x in load_file(s).values()) <= 10_000 for s in shards)
    assert index["metadata"]["total_size"] == 2 * cfg.n_params
    assert checkpoint_dtype(tmp_path / "out") == "bfloat16"
    again, _ = imported(tmp_path / "out", "bfloat16")
    equal_trees(again, params)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    # Rounding of float32 to bfloat16 is that of torch.
    for key, value in AutoModelForCausalLM.from_pretrained(untied).state_dict().items():
        assert torch.equal(value.to(torch.bfloat16), loaded.state_dict()[key]), key


def test_shards_of_transformers(untied, tmp_path):
    AutoModelForCausalLM.from_pretrained(untied).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    equal_trees(imported(tmp_path / "shards")[0], imported(untied)[0])


def test_tokenizer_files_and_config_come_from_the_source(untied, tmp_path):
    source = shutil.copytree(untied, tmp_path / "source")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "modeling_evil.py", "pytorch_model.bin"):
        (source / name).write_text(f"content of {name}")
    params, cfg = imported(untied)
    raw = json.loads((source / "config.json").read_text()) | {"torch_dtype": "float32", "auto_map": {"AutoModel": "modeling_evil.X"}}
    save_params(params, cfg, tmp_path / "out", "bfloat16", raw, tokenizer_from=source)
    names = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "content of tokenizer.json"
    expected = {k: v for k, v in raw.items() if k != "auto_map"} | {"torch_dtype": "bfloat16", "dtype": "bfloat16"}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == expected
    modes = {p.name: oct(p.stat().st_mode) for p in (tmp_path / "out").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_nothing_half_written(untied, tmp_path, monkeypatch):
    params, cfg = imported(untied)

    def disk_full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(tensors, "save_file", disk_full)
    with pytest.raises(OSError, match="No space"):
        save_params(params, cfg, tmp_path / "out", "float32")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out exists; choose another folder"):
        save_params(params, cfg, tmp_path / "out", "float32")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot create"):
        save_params(params, cfg, tmp_path / "file" / "out", "float32")


def test_a_config_of_another_architecture_is_not_written(untied, tmp_path):
    params, cfg = imported(untied)
    with pytest.raises(ValueError, match="another architecture"):
        save_params(params, cfg, tmp_path / "out", "float32", to_hf(cfg) | {"rope_theta": 1.0})


# Meshes


def test_load_and_save_on_a_mesh_equal_one_device(untied, tmp_path):
    params, cfg = imported(untied)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), jax.devices()[:8])
    sharded = load_params(untied, cfg, "float32", mesh)
    equal_trees(sharded, params)
    gate = sharded.layers.gate_LDF
    assert gate.sharding == named(mesh, "layers", "embed", "ffn")
    assert {s.data.shape for s in gate.addressable_shards} == {(3, 32 // 4, 48 // 2)}
    save_params(sharded, cfg, tmp_path / "out", "float32")
    equal_trees(imported(tmp_path / "out")[0], params)


def test_experts_on_a_mesh_and_in_shards(experts, tmp_path):
    """The checkpoint has one tensor for each expert of each layer, we have one array."""
    params, cfg = imported(experts)
    stored = load_file(experts / "model.safetensors")
    for l, e in ((0, 7), (2, 3)):
        gate = stored[f"model.layers.{l}.mlp.experts.{e}.gate_proj.weight"]
        np.testing.assert_array_equal(params.layers.gate_LEDF[l, e], gate.T)
    sharded = load_params(experts, cfg, "float32", make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), jax.devices()[:8]))
    equal_trees(sharded, params)
    assert {s.data.shape for s in sharded.layers.down_LEFD.addressable_shards} == {(3, 8, 24 // 2, 32 // 4)}
    save_params(sharded, cfg, tmp_path / "out", "float32", max_shard_bytes=20_000)
    equal_trees(imported(tmp_path / "out")[0], params)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_missing_expert_is_named(experts, tmp_path):
    folder = shutil.copytree(experts, tmp_path / "broken")
    edit(folder, lambda arrays: arrays.pop("model.layers.1.mlp.experts.5.up_proj.weight"))
    assert "missing from the checkpoint: model.layers.1.mlp.experts.5.up_proj.weight" in import_error(folder)


def test_a_mesh_that_does_not_divide_is_named(untied):
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=4), jax.devices()[:4])
    with pytest.raises(UserError, match=r"mesh axis tensor=4 does not divide kv_heads=2 of model.layers.{l}.self_attn.k_proj.weight"):
        load_params(untied, load_config(str(untied))[0], "float32", mesh)


WORKER = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
rank, port, source, out = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(rank))
from pathlib import Path
from opsa_jax.config import MeshConfig
from opsa_jax.models.hf import load_config, load_params, save_params
from opsa_jax.parallel.mesh import make_mesh
cfg, raw = load_config(source)
params = load_params(Path(source), cfg, "float32", make_mesh(MeshConfig(data=1, fsdp=2, tensor=2)))
assert not params.layers.gate_LDF.is_fully_addressable
save_params(params, cfg, Path(out), "float32", raw)
assert (Path(out) / "config.json").exists()
"""


@pytest.mark.slow
def test_two_processes_load_and_save_together(untied, tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    command = [sys.executable, "-c", WORKER]
    workers = [subprocess.Popen([*command, str(rank), port, str(untied), str(tmp_path / "out")]) for rank in (0, 1)]
    assert [w.wait(timeout=300) for w in workers] == [0, 0]
    equal_trees(imported(tmp_path / "out")[0], imported(untied)[0])


# What a user can get wrong


def test_missing_and_unexpected_keys_are_named(broken):
    edit(broken, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    assert "missing from the checkpoint: model.layers.1.mlp.up_proj.weight" in import_error(broken)
    edit(broken, lambda t: t.update({"model.layers.1.mlp.up_proj.weight": np.zeros((48, 32), np.float32), "surprise": np.zeros(3)}))
    assert "not part of the architecture that config.json describes: surprise" in import_error(broken)


def test_wrong_shape_names_tensor_and_both_shapes(broken):
    """A transposed matrix has the right number of values."""
    edit(broken, lambda t: t.update({"model.layers.2.self_attn.o_proj.weight": np.zeros((64, 32), np.float32)}))
    message = import_error(broken)
    assert "model.layers.2.self_attn.o_proj.weight has shape (64, 32); config.json says (32, 64)" in message


def test_truncated_and_damaged_files(broken):
    file = broken / "model.safetensors"
    data = file.read_bytes()
    for content in (data[:-100], data[:50], b"", b"not safetensors at all", struct.pack("<Q", 2**60) + data[8:]):
        file.write_bytes(content)
        assert "model.safetensors: not a complete safetensors file" in import_error(broken)


def test_missing_shard_and_wrong_index(untied, tmp_path):
    folder = tmp_path / "shards"
    AutoModelForCausalLM.from_pretrained(untied).save_pretrained(folder, max_shard_size="20KB")
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    first, last = sorted(set(index["weight_map"].values()))[:: len(set(index["weight_map"].values())) - 1]
    moved = next(k for k, v in index["weight_map"].items() if v == first)
    index_file.write_text(json.dumps({"weight_map": index["weight_map"] | {moved: last}}))
    assert f"tensor {moved} should be in {last} and is in {first}" in import_error(folder)
    index_file.write_text("{")
    assert "model.safetensors.index.json is damaged" in import_error(folder)
    index_file.write_text(json.dumps(index))
    (folder / last).unlink()
    assert f"the file {last} of the checkpoint is missing" in import_error(folder)


def test_pickle_is_never_opened(broken):
    (broken / "model.safetensors").unlink()
    (broken / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n")
    message = import_error(broken)
    assert "has no model.safetensors" in message and "pytorch_model.bin" in message and "never opened" in message


def test_quantised_weights_are_refused(broken):
    edit(broken, lambda t: t.update({"model.layers.0.mlp.up_proj.weight": np.zeros((48, 32), np.int8)}))
    assert "tensor model.layers.0.mlp.up_proj.weight has dtype I8; allowed: F64, F32, BF16, F16" in import_error(broken)


def test_tied_head_may_be_stored_if_it_is_the_embedding(tied, tmp_path):
    folder = shutil.copytree(tied, tmp_path / "copy")
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    equal_trees(imported(folder)[0], imported(tied)[0])
    edit(folder, lambda t: t["lm_head.weight"].__setitem__((5, 3), 7.0))
    assert "lm_head.weight differs from model.embed_tokens.weight, but config.json says tie_word_embeddings" in import_error(folder)


def test_old_rotary_buffers_are_ignored(broken, untied):
    edit(broken, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32)}))
    equal_trees(imported(broken)[0], imported(untied)[0])


def test_dtype_of_a_checkpoint_is_the_one_that_loses_nothing(broken):
    assert checkpoint_dtype(broken) == "float32"
    edit(broken, lambda t: t.update({k: v.astype(jnp.bfloat16) for k, v in t.items()}))
    assert checkpoint_dtype(broken) == "bfloat16"
    edit(broken, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].astype(np.float32)}))
    assert checkpoint_dtype(broken) == "float32"
    edit(broken, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].astype(np.float16)}))
    assert checkpoint_dtype(broken) == "float32"


def test_unreadable_configs(broken):
    (broken / "config.json").write_text("{")
    assert "config.json is not JSON" in import_error(broken)
    (broken / "config.json").write_text("[]")
    assert "config.json is not a JSON object" in import_error(broken)
    (broken / "config.json").unlink()
    assert "has no config.json" in import_error(broken)


def test_paths_that_are_neither_folder_nor_hub_name(broken):
    for path in ("no-such-folder", "/no/such/folder", "a/b/c", "../x", "org/na me"):
        with pytest.raises(UserError, match="not a hub name"):
            fetch(path)
    with pytest.raises(UserError, match="is a file; give the checkpoint's folder"):
        fetch(str(broken / "config.json"))


HUB_ERRORS = {
    "GatedRepoError": "gated: accept its terms",
    "RepositoryNotFoundError": "does not exist or is private",
    "RevisionNotFoundError": "no such branch, tag or commit",
    "LocalEntryNotFoundError": "not in the local cache and the hub cannot be reached",
    "HFValidationError": "could not be downloaded",
    "OfflineModeIsEnabled": "could not be downloaded",
}


@pytest.mark.parametrize("name", HUB_ERRORS)
def test_hub_errors_are_one_line(name, monkeypatch):
    error = getattr(huggingface_hub.errors, name)

    def fail(*_, **__):
        raise error.__new__(error)  # the constructors of some need an HTTP response

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=HUB_ERRORS[name]) as caught:
        fetch("org/name", "v2")
    assert "'org/name'" in str(caught.value) and "'v2'" in str(caught.value) and "\n" not in str(caught.value)


def test_offline_without_a_copy(monkeypatch, tmp_path):
    """The real client, told to stay offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="hub"):
        load_config("org/name")


def test_only_weights_and_text_are_downloaded(monkeypatch, untied):
    files = ["a.safetensors", "pytorch_model.bin", "modeling_x.py", "config.json", "tokenizer.model", "original/consolidated.00.pth"]
    files += ["consolidated.safetensors", "merges.txt", "model.safetensors.index.json", "original/a.safetensors", "x.gguf"]
    calls = []

    def download(name, revision, allow_patterns, ignore_patterns):
        chosen = huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        calls.append((name, revision, set(chosen)))
        return str(untied)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert fetch("org/name", "abc") == untied
    load_config("org/name", "abc")
    wanted = {"a.safetensors", "config.json", "tokenizer.model", "merges.txt", "model.safetensors.index.json"}
    assert calls == [("org/name", "abc", wanted), ("org/name", "abc", {"config.json"})]


def test_float32_checkpoint_as_bfloat16_rounds_like_jax(untied):
    cfg, _ = load_config(str(untied))
    wide, narrow = (load_params(untied, cfg, d, one_device()) for d in ("float32", "bfloat16"))
    equal_trees(jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide), narrow)


def test_adapters_must_be_merged_before_export(untied, tmp_path):
    params, cfg = imported(untied)
    with pytest.raises(ValueError, match="merge"):
        save_params(params.replace(layers=params.layers.replace(lora={})), cfg, tmp_path / "out", "float32")
