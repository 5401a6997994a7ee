from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from cases import tiny_gpt, tokens

from gptnorm.config import OptimConfig
from gptnorm.errors import UserError
from gptnorm.files import sha256_file
from gptnorm.train import checkpoint
from gptnorm.train.checkpoint import latest_checkpoint, load_checkpoint, prune_checkpoints, save_checkpoint
from gptnorm.train.optim import build_optimizer


def trained(seed=0, **changes):
    model = tiny_gpt("prenorm", "gpt2", seed=seed, **changes)
    optimizer = build_optimizer(model, OptimConfig())
    model.loss(tokens()).backward()
    optimizer.step()
    return model, optimizer


def test_round_trip_is_exact(tmp_path):
    model, optimizer = trained()
    path = save_checkpoint(tmp_path, 7, model, optimizer, {"seconds": 1.5})
    other, other_optimizer = trained(seed=3)
    assert load_checkpoint(path, other, other_optimizer) == {"step": 7, "seconds": 1.5}
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        for key, value in optimizer.state[a].items():
            assert torch.equal(value, other_optimizer.state[b][key])


def test_manifest_is_true(tmp_path):
    path = save_checkpoint(tmp_path, 1, *trained(), {})
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest) == {p.name for p in path.iterdir()} - {"manifest.json"}
    assert all(sha256_file(path / name) == digest for name, digest in manifest.items())


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_damage_is_refused(tmp_path, name, harm):
    model, optimizer = trained()
    path = save_checkpoint(tmp_path, 1, model, optimizer, {})
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    if harm == "flip":
        (path / name).write_bytes(content)
    elif harm == "cut":
        (path / name).write_bytes(content[:-1])
    else:
        (path / name).unlink()
    with pytest.raises(UserError, match="step-000001"):
        load_checkpoint(path, model, optimizer)


def test_a_pickle_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    model, optimizer = trained()
    path = save_checkpoint(tmp_path, 1, model, optimizer, {})
    (path / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["model.safetensors"] = sha256_file(path / "model.safetensors")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError):
        load_checkpoint(path, model, optimizer)
    assert not (tmp_path / "ran").exists()


def test_another_model_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, 1, *trained(), {})
    with pytest.raises(UserError, match="shape"):
        load_checkpoint(path, *trained(d_ff=96))


@pytest.mark.parametrize("at", ["_save", "sha256_file", "write_atomic"])
def test_failure_while_writing_leaves_the_old_ones_only(tmp_path, monkeypatch, at):
    model, optimizer = trained()
    old = save_checkpoint(tmp_path, 1, model, optimizer, {})

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, at, fail)
    with pytest.raises(OSError, match="space"):
        save_checkpoint(tmp_path, 2, model, optimizer, {})
    assert list(tmp_path.iterdir()) == [old]
    assert latest_checkpoint(tmp_path) == old


def test_newest_are_kept_by_number_not_by_name(tmp_path):
    model, optimizer = trained()
    for step in (999_999, 1_000_000, 5):
        save_checkpoint(tmp_path, step, model, optimizer, {})
    prune_checkpoints(tmp_path, 2)
    assert {p.name for p in tmp_path.iterdir()} == {"step-999999", "step-1000000"}
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.name == "step-1000000"
