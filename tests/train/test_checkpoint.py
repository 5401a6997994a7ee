from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from cases import tiny_gpt, tokens
from saving import load, save, tensors
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from gptnorm.config import CheckpointConfig, OptimConfig
from gptnorm.errors import UserError
from gptnorm.files import sha256_file
from gptnorm.train import checkpoint
from gptnorm.train.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    set_aside_beyond,
    sweep_partial,
    verify_checkpoint,
)
from gptnorm.train.optim import build_optimizer
from gptnorm.train.resume import choose_checkpoint
from gptnorm.train.saver import Saver

MODEL = "shard-00001-model-00001-of-00002.safetensors"
OPTIMIZER = "shard-00001-model-00002-of-00002.safetensors"


def trained(seed=0, name="adamw", **changes):
    model = tiny_gpt("prenorm", "gpt2", seed=seed, **changes)
    optimizer = build_optimizer(model, OptimConfig(name=name))
    model.loss(tokens()).backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_round_trip_is_exact(tmp_path, name):
    model, optimizer = trained(name=name)
    path = save(tmp_path, 7, model, optimizer, {"seconds": 1.5})
    other, other_optimizer = trained(seed=3, name=name)
    assert load(path, other, other_optimizer) == {"step": 7, "seconds": 1.5}
    expected = tensors(model, optimizer)
    assert len(expected) > 3 * len(list(model.buffers())) + len(list(model.parameters()))
    for key, tensor in tensors(other, other_optimizer).items():
        assert torch.equal(tensor, expected[key]), key


def test_a_fresh_optimizer_can_be_filled(tmp_path):
    """Its state exists only after a step; making it must not move a weight."""
    model, optimizer = trained()
    path = save(tmp_path, 7, model, optimizer)
    fresh = tiny_gpt("prenorm", "gpt2", seed=3)
    before = {name: p.detach().clone() for name, p in fresh.named_parameters()}
    fresh_optimizer = build_optimizer(fresh, OptimConfig())
    fresh_optimizer.prime()
    for key, p in fresh.named_parameters():
        assert torch.equal(p, before[key])
        assert p.grad is None
    load(path, fresh, fresh_optimizer)
    for m, o in ((model, optimizer), (fresh, fresh_optimizer)):
        o.zero_grad()
        m.loss(tokens(seed=5)).backward()
        o.step()
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)


def test_manifest_is_true(tmp_path):
    path = save(tmp_path, 1, *trained())
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest) == {p.name for p in path.iterdir()} - {"manifest.json"} == {MODEL, OPTIMIZER, "state.json"}
    assert all(sha256_file(path / name) == digest for name, digest in manifest.items())


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_damage_is_named(tmp_path, name, harm):
    path = save(tmp_path, 1, *trained())
    verify_checkpoint(path)
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    if harm == "flip":
        (path / name).write_bytes(content)
    elif harm == "cut":
        (path / name).write_bytes(content[:-1])
    else:
        (path / name).unlink()
    found = f"step-000001/{name}: {'missing' if harm == 'remove' else 'damaged'}"
    with pytest.raises(UserError, match="step-000001" if name == "manifest.json" else found):
        verify_checkpoint(path)
    with pytest.raises(UserError, match="step-000001"):
        choose_checkpoint(tmp_path)


def test_a_damaged_newest_is_left_out_only_on_demand(tmp_path):
    model, optimizer = trained()
    for step in (1, 2, 3):
        path = save(tmp_path, step, model, optimizer)
    assert choose_checkpoint(tmp_path).name == "step-000003"
    (path / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"step-000003/state\.json: damaged.*--auto"):
        choose_checkpoint(tmp_path)
    assert choose_checkpoint(tmp_path, auto=True).name == "step-000002"
    assert choose_checkpoint(tmp_path, step=1).name == "step-000001"
    with pytest.raises(UserError, match=r"--step = 9: .*1, 2, 3"):
        choose_checkpoint(tmp_path, step=9)
    for step in (1, 2):
        (tmp_path / f"step-00000{step}" / MODEL).unlink()
    with pytest.raises(UserError, match=r"step-000003.*step-000002.*step-000001"):
        choose_checkpoint(tmp_path, auto=True)


def test_a_pickle_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    model, optimizer = trained()
    path = save(tmp_path, 1, model, optimizer)
    (path / MODEL).write_bytes(pickle.dumps(Bomb()))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest[MODEL] = sha256_file(path / MODEL)
    (path / "manifest.json").write_text(json.dumps(manifest))
    verify_checkpoint(path)
    (path / ".metadata").write_bytes(pickle.dumps(Bomb()))  # where torch's own format has its pickle
    with pytest.raises(UserError, match="step-000001"):
        load(path, model, optimizer)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../../outside.safetensors", "/etc/hostname", "shard-00001.bin", ""])
def test_a_manifest_cannot_name_files_elsewhere(tmp_path, name):
    path = save(tmp_path / "checkpoints", 1, *trained())
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {name: "0" * 64}))
    with pytest.raises(UserError, match="which is no file of a checkpoint"):
        verify_checkpoint(path)


def test_a_file_that_no_manifest_names_is_refused(tmp_path):
    """The reader takes every .safetensors file of the folder."""
    path = save(tmp_path, 1, *trained())
    (path / "shard-00002-model-00001-of-00002.safetensors").write_bytes((path / MODEL).read_bytes())
    with pytest.raises(UserError, match=r"shard-00002.*not in the manifest"):
        verify_checkpoint(path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"state.json": 3}', "null"])
def test_a_broken_manifest_is_one_line(tmp_path, content):
    path = save(tmp_path, 1, *trained())
    (path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="step-000001"):
        verify_checkpoint(path)


def test_a_linked_file_is_refused(tmp_path):
    path = save(tmp_path, 1, *trained())
    (path / MODEL).rename(tmp_path / "elsewhere")
    (path / MODEL).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="damaged"):
        verify_checkpoint(path)


def test_another_model_is_refused(tmp_path):
    path = save(tmp_path, 1, *trained())
    with pytest.raises(UserError, match="shape"):
        load(path, *trained(d_ff=96))
    with pytest.raises(UserError, match="holds other tensors than this run's model and optimizer"):
        load(path, *trained(n_layers=3))
    others = {k: v for k, v in tensors(*trained(name="muon")).items() if k.startswith("optimizer/")}
    with pytest.raises(UserError, match="holds other tensors than this run's optimizer"):
        load_checkpoint(path, others)


@pytest.mark.parametrize("at", ["write_data", "sha256_file", "write_atomic"])
def test_failure_while_writing_leaves_the_old_ones_only(tmp_path, monkeypatch, at):
    model, optimizer = trained()
    old = save(tmp_path, 1, model, optimizer)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(HuggingFaceStorageWriter if at == "write_data" else checkpoint, at, fail)
    with pytest.raises(OSError, match="space"):
        save(tmp_path, 2, model, optimizer)
    assert list(tmp_path.iterdir()) == [old]
    assert latest_checkpoint(tmp_path) == old


def test_newest_and_best_are_kept_by_number_not_by_name(tmp_path):
    model, optimizer = trained()
    for step in (7, 999_999, 1_000_000, 5):
        save(tmp_path, step, model, optimizer)
    prune_checkpoints(tmp_path, 2, best=5)
    assert {p.name for p in tmp_path.iterdir()} == {"step-000005", "step-999999", "step-1000000"}
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.name == "step-1000000"
    set_aside_beyond(tmp_path, 5)
    assert {p.name for p in tmp_path.iterdir()} == {"step-000005", "aside-step-999999", "aside-step-1000000"}


def test_what_a_kill_left_is_swept(tmp_path):
    path = save(tmp_path, 3, *trained())
    (tmp_path / ".step-000004.partial").mkdir()
    (tmp_path / ".step-000004.partial" / MODEL).write_bytes(b"half")
    sweep_partial(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_asynchronous_save_keeps_what_was_when_it_began(tmp_path):
    model, optimizer = trained()
    expected = {name: tensor.clone() for name, tensor in tensors(model, optimizer).items()}
    saver = Saver(tmp_path, CheckpointConfig(keep=1), torch.device("cpu"))
    saver.save(1, tensors(model, optimizer), {}, None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    saver.save(2, tensors(model, optimizer), {}, best=1)
    saver.close()
    load(tmp_path / "step-000001", model, optimizer)
    for name, tensor in tensors(model, optimizer).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(("device", "expected"), [("cuda", 3), ("cuda:2", 2)])
def test_a_saver_s_thread_has_the_gpu_of_its_process(tmp_path, monkeypatch, device, expected):
    """`cuda` has no number, and CUDA takes none without."""
    taken = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    saver = Saver(tmp_path, CheckpointConfig(), torch.device(device))
    saver.save(1, tensors(*trained()), {}, None)
    saver.close()
    assert taken == [expected]
    assert (tmp_path / "step-000001").is_dir()


def test_a_failed_asynchronous_save_is_told_at_the_next(tmp_path):
    model, optimizer = trained()
    saver = Saver(tmp_path / "file" / "checkpoints", CheckpointConfig(), torch.device("cpu"))
    (tmp_path / "file").touch()
    saver.save(1, tensors(model, optimizer), {}, None)
    with pytest.raises(NotADirectoryError):
        saver.save(2, tensors(model, optimizer), {}, None)
    saver.close()
