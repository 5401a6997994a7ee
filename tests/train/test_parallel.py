"""Models on 2 and 4 processes against the same model on one.

torchrun starts the processes of a world size once, and they work through all of its cases (`parallel_worker`).

Tolerances. In fp64 both models compute the same sums in another order, so everything agrees to 1e-11 of the largest
entry (a unit of the last place is 2e-16; five digits are for what depth, Adam's division by small second moments and
small differences of large numbers make of it). In fp32 a difference in the last place grows with the updates: over 50
of them losses between 1 and 5 stay within 1e-4 nats (the largest seen is 1.5e-5).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BACKBONES, ROWS, tiny_shape

from gptnorm.config import Config, ModelConfig, MoEConfig, ParallelConfig, TrainConfig
from gptnorm.errors import UserError
from gptnorm.norms import Norm
from gptnorm.strategies import make_strategy
from gptnorm.strategies.prenorm import PreNorm
from gptnorm.train.parallel import close_world, mean_over_data, open_world
from gptnorm.train.tensor_parallel import check_tensor_parallel

EXACT = 1e-11
FIFTY_STEPS = 1e-4
BY_DIFFERENCES = 1e-5
"""Relative, of eigenvalues in fp64: both iterations stop at an error of 1e-6, and six digits are told. (Products differ
by about 1e-6: of two gradients at a distance of 4e-10 the difference has lost ten of sixteen digits.)"""

Case = dict[str, Any]
LAYOUTS = {2: ((2, 1), (1, 2)), 4: ((2, 2), (4, 1))}
"""Processes along "data" and "tensor", by world size."""


def laid_out(name: str, size: int, only: tuple[int, int] | None = None, **case: Any) -> dict[str, Case]:
    """A case on every layout of a world size that can carry it."""
    case = {"check": "steps", **case}
    return {
        f"{name}-{data}x{tensor}": {**case, "data": data, "tensor": tensor}
        for data, tensor in LAYOUTS[size]
        if only in (None, (data, tensor)) and not (tensor > 1 and "moe" in case)
    }


def merged(*parts: dict[str, Case]) -> dict[str, Case]:
    return {name: case for part in parts for name, case in part.items()}


# Each has an equation of its own to be cut: where its norms stand, over which axis, and what it does to its weights.
CORE: dict[str, Case] = {
    "prenorm": {"strategy": "prenorm"},
    "qknorm-full": {"strategy": "prenorm_qknorm"},
    "qknorm-head": {"strategy": "prenorm_qknorm", "options": {"qk_norm": "head"}},
    "postnorm": {"strategy": "postnorm"},
    "simplenorm": {"strategy": "simplenorm"},
    "spannorm": {"strategy": "spannorm"},
    "angpt": {"strategy": "angpt"},
    "ngpt": {"strategy": "ngpt"},
    "periln": {"strategy": "periln"},
    "residual_dual": {"strategy": "residual_dual"},
}

MOE: Case = {"experts": 4, "top_k": 2, "shared": 1, "branch_gain": "auto"}
"""The balancing loss is one of a process's own rows: it is left out of what is compared with the dense model."""

PENALTY = {"bound": "penalty", "alpha_per": "branch"}
ODD = {"vocab_size": 62, "d_ff": 90}
"""Two processes of four have 31 rows of the table, and 45 features, to share."""

FAST = {
    2: merged(
        *(laid_out(name, 2, only=(1, 2), **case) for name, case in CORE.items()),
        *(laid_out(name, 2, only=(2, 1), **CORE[name]) for name in ("simplenorm", "angpt", "ngpt", "residual_dual")),
        # Learned positions, one weight for embedding and head, LayerNorm, no gate.
        laid_out("tied", 2, strategy="simplenorm", backbone="gpt2"),
        laid_out("tied-penalty", 2, only=(1, 2), strategy="angpt", backbone="gpt2", own=PENALTY),
        laid_out("layernorm-full", 2, only=(1, 2), strategy="prenorm_qknorm", backbone="gpt2"),
        laid_out("clip", 2, only=(1, 2), strategy="prenorm", options={"qk_clip": 1e-3}),
        laid_out("caps", 2, only=(1, 2), strategy="prenorm", options={"z_loss": 0.01, "logit_softcap": 3.0}),
        laid_out("moe", 2, strategy="ngpt", moe={**MOE, "balance": "none", "z_loss": 1e-3}),
        laid_out("moe-bias", 2, strategy="prenorm", moe={**MOE, "balance": "bias"}, train={"recompute": "full"}),
        laid_out("frozen", 2, strategy="simplenorm", options={"norm_scale": "frozen"}),
        laid_out("frozen-full", 2, only=(1, 2), strategy="prenorm_qknorm", options={"norm_scale": "frozen"}),
        laid_out("frozen-head", 2, only=(1, 2), strategy="qkv_norm", options={"norm_scale": "frozen"}),
        laid_out(
            "frozen-moe", 2, strategy="simplenorm", options={"norm_scale": "frozen"}, moe={**MOE, "balance": "none"}
        ),
        laid_out("built-first", 2, only=(1, 2), strategy="ngpt", built=True),
        laid_out("recompute-full", 2, only=(1, 2), strategy="simplenorm", train={"recompute": "full"}),
        laid_out("recompute-selective", 2, only=(1, 2), strategy="simplenorm", train={"recompute": "selective"}),
        laid_out("gathered-kept", 2, only=(2, 1), strategy="spannorm", parallel={"reshard": False}),
        laid_out("training", 2, only=(1, 2), check="training", strategy="prenorm_qknorm"),
        laid_out("maps", 2, only=(1, 2), check="maps", strategy="prenorm"),
        laid_out("dropping", 2, only=(1, 2), check="dropping", strategy="prenorm", model={"dropout": 0.3}),
        laid_out("low-precision", 2, check="low_precision", strategy="simplenorm", parallel={"param_dtype": "bf16"}),
        laid_out("gauge", 2, check="gauge", strategy="simplenorm", model={"n_layers": 1}),
        laid_out("float8", 2, only=(2, 1), check="float8", strategy="simplenorm", train={"precision": "fp8"}),
        laid_out("float8-moe", 2, check="float8", strategy="prenorm", moe=MOE, train={"precision": "fp8"}),
    ),
    4: merged(
        laid_out("simplenorm", 4, only=(2, 2), strategy="simplenorm"),
        laid_out("uneven", 4, only=(2, 2), strategy="angpt", backbone="gpt2", own=PENALTY, model=ODD),
    ),
}


def _slow(size: int) -> dict[str, Case]:
    """Every strategy on every backbone and layout; fifty steps of the core; compiled blocks with what they keep."""
    rows = [
        laid_out(f"{row.strategy}-{backbone}", size, strategy=row.strategy, backbone=backbone, own=dict(row.own))
        for row in ROWS
        for backbone in BACKBONES
    ]
    fifty = [
        laid_out(f"fifty-{name}-{backbone}", size, check="training", backbone=backbone, **case)
        for name, case in CORE.items()
        for backbone in ("gpt2", "llama3")
    ]
    compiled = [
        laid_out(f"compiled-{recompute}-{name}", size, train={"compile": True, "recompute": recompute}, **case)
        for recompute in ("none", "selective", "full")
        for name, case in {
            "angpt": CORE["angpt"],
            "qknorm-head": CORE["qknorm-head"],
            "clip": {"strategy": "prenorm", "options": {"qk_clip": 1e-3}},
            "moe": {"strategy": "prenorm", "moe": {**MOE, "balance": "bias"}},
        }.items()
    ]
    options = [
        laid_out("values-full", size, strategy="prenorm", options={"qk_norm": "head", "v_norm": "full"}),
        laid_out("values-head", size, strategy="postnorm", options={"v_norm": "head", "attention_softcap": 5.0}),
        laid_out("clip-plain", size, strategy="prenorm", backbone="gpt2", options={"qk_clip": 1e-3}),
        laid_out("built", size, strategy="ngpt", backbone="gpt2", built=True),
    ]
    gauges = [
        laid_out("gauge-tied", size, check="gauge", strategy="angpt", backbone="gpt2", own=PENALTY),
        laid_out("gauge-experts", size, check="gauge", strategy="prenorm", moe={**MOE, "balance": "none"}),
    ]
    return merged(*rows, *fifty, *compiled, *options, *gauges)


SLOW = {size: _slow(size) for size in LAYOUTS}
PACE = {"fast": FAST, "slow": SLOW}

Results = Callable[[str, int], dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What the processes of a world size found, started at the first question."""
    known: dict[tuple[str, int], dict[str, Any]] = {}

    def ask(pace: str, size: int) -> dict[str, Any]:
        if (pace, size) not in known:
            known[pace, size] = _launch(tmp_path_factory.mktemp("parallel"), PACE[pace][size], size)
        return known[pace, size]

    return ask


def _launch(folder: Path, cases: dict[str, Case], size: int) -> dict[str, Any]:
    (folder / "cases.json").write_text(json.dumps(cases))
    worker = Path(__file__).with_name("parallel_worker.py")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    ended = subprocess.run(
        [sys.executable, *launcher, str(worker), str(folder / "cases.json"), str(folder / "results.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60 + 60 * len(cases),
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads((folder / "results.json").read_text())


def _params() -> list[Any]:
    return [
        pytest.param(pace, size, name, id=f"{name}-of-{size}", marks=[pytest.mark.slow] if pace == "slow" else [])
        for pace, sizes in PACE.items()
        for size, cases in sizes.items()
        for name in cases
    ]


@pytest.mark.parametrize(("pace", "size", "name"), _params())
def test_agrees_with_one_process(results: Results, pace: str, size: int, name: str) -> None:
    case, found = PACE[pace][size][name], results(pace, size)[name]
    assert "error" not in found, found["error"]
    JUDGES[case["check"]](case, found)


def _judge_steps(case: Case, found: dict[str, Any]) -> None:
    assert found.pop("different at the start") == []
    kinds = {"loss", "gradient", "norm", "weight"}
    assert kinds <= found.keys()
    if any(row.strategy == case["strategy"] and row.constraints for row in ROWS) and "own" not in case:
        assert "constraint" in found
    _judge_exact(case, found)


def _judge_training(case: Case, found: dict[str, Any]) -> None:
    dense, spread = found["dense"], found["spread"]
    assert len(dense) == 50
    assert dense[-1] < dense[0] - 0.5, "nothing was learned"
    assert max(abs(a - b) for a, b in zip(dense, spread, strict=True)) < FIFTY_STEPS
    if case["tensor"] > 1:
        assert found["copies"][0] == 0, found["copies"]


def _judge_exact(case: Case, found: dict[str, Any]) -> None:
    assert found
    for kind, (difference, name) in found.items():
        assert difference < EXACT, (kind, name)


def _judge_low_precision(case: Case, found: dict[str, Any]) -> None:
    assert set(found["used"]) == {"torch.bfloat16"}
    assert found["kept"] == ["torch.float32"]
    # bf16 keeps eight bits: half a percent of a weight at most.
    assert found["losses"][1] == pytest.approx(found["losses"][0], rel=5e-3)
    assert found["norms"][1] == pytest.approx(found["norms"][0], rel=3e-2)
    if case["tensor"] == 1:
        assert found["reduced"][0] < 1e-6, found["reduced"]
        assert found["reduced in bf16"][0] > 1e-3, "a sum in bf16 would not have been noticed"


def _judge_float8(case: Case, found: dict[str, Any]) -> None:
    # The order of sums in fp32; another scale would differ by percents.
    assert found["gradient"][0] < 1e-6, found["gradient"]


def _judge_gauge(case: Case, found: dict[str, Any]) -> None:
    dense, spread = found.pop("dense"), found.pop("spread")
    for one, other in zip(dense, spread, strict=True):
        assert "gauge_refused" not in {**one, **other}
        for key in ("hessian_max", "adam_sharpness", "adam_threshold"):
            assert (key in one) == (key in other)
            if key in one:
                assert other[key] == pytest.approx(one[key], rel=BY_DIFFERENCES), key
    assert "adam_sharpness" in dense[1]
    assert dense[1]["hessian_max"] != dense[0]["hessian_max"]
    _judge_exact(case, found)


JUDGES = {
    "steps": _judge_steps,
    "training": _judge_training,
    "dropping": _judge_exact,
    "maps": _judge_exact,
    "low_precision": _judge_low_precision,
    "float8": _judge_float8,
    "gauge": _judge_gauge,
}


def layout(data: int | None = None, tensor: int = 1, **changes: Any) -> Config:
    model = {
        "strategy": "prenorm",
        "d_model": 32,
        "n_layers": 1,
        "n_heads": 4,
        "d_ff": 80,
        "vocab_size": 64,
        **changes.pop("model", {}),
    }
    return Config(
        model=ModelConfig(**model),
        moe=MoEConfig(**changes.pop("moe", {})),
        train=TrainConfig(**{"batch_size": 8, "device": "cpu", **changes.pop("train", {})}),
        parallel=ParallelConfig(data=data, tensor=tensor, **changes),
    )


@pytest.mark.parametrize(
    ("processes", "config", "message"),
    [
        (None, layout(2), r"parallel\.data = 2: .*number of processes, 1.*torchrun"),
        (None, layout(tensor=2), r"parallel\.tensor = 2: .*number of processes, 1.*torchrun"),
        (None, layout(param_dtype="bf16"), r"parallel\.param_dtype = 'bf16': .*torchrun"),
        (4, layout(2), r"parallel\.data = 2: times parallel\.tensor = 1 must be the number of processes, 4"),
        (4, layout(4, 2), r"parallel\.data = 4: times parallel\.tensor = 2 must be the number of processes, 4"),
        (4, layout(tensor=3), r"parallel\.tensor = 3: must divide the number of processes, 4"),
        (4, layout(train={"batch_size": 6}), r"train\.batch_size = 6: .*multiple of the 4 processes"),
        (4, layout(train={"accumulate": 4}), r"train\.batch_size = 8: over train\.accumulate = 4 .*the 4 processes"),
        (2, layout(tensor=2, model={"n_heads": 1}), r"parallel\.tensor = 2: must divide model\.n_heads = 1"),
        (
            4,
            layout(tensor=4, model={"backbone": "llama3", "n_kv_heads": 2}),
            r"parallel\.tensor = 4: must divide model\.n_kv_heads = 2",
        ),
        (2, layout(tensor=2, model={"d_ff": 81}), r"parallel\.tensor = 2: must divide model\.d_ff = 81"),
        (
            2,
            layout(tensor=2, model={"vocab_size": 61}),
            r"parallel\.tensor = 2: .* model\.vocab_size = 61; 62 would do",
        ),
        (
            2,
            layout(tensor=2, model={"backbone": "llama2"}, moe={"experts": 4}),
            r"parallel\.tensor = 2: must be 1 with moe\.experts",
        ),
        (2, layout(train={"device": "cpu:1"}), r"train\.device = 'cpu:1'"),
    ],
)
def test_layouts_that_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, processes: int | None, config: Config, message: str
) -> None:
    """Told in one line before any process waits for another."""
    _pretend(monkeypatch, processes)
    with pytest.raises(UserError, match=message) as error:
        open_world(config)
    assert "\n" not in str(error.value)


def _pretend(monkeypatch: pytest.MonkeyPatch, processes: int | None) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(processes)}.items():
        if processes is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


def test_a_norm_of_some_other_width_cannot_be_cut() -> None:
    """What follows a cut map has to run over all of its features, or over none."""

    class Odd(PreNorm):
        def projection(self, role, layer, shape):
            return (Norm(kind="rmsnorm", size=shape.head_dim, eps=1e-5, axis="head"),) if role == "gate" else ()

    shape = tiny_shape("llama3", vocab_size=64)
    check_tensor_parallel(shape, make_strategy("prenorm", {}), 2)
    with pytest.raises(UserError, match=r"parallel\.tensor = 2: must be 1: Norm\(.* after gate cannot be cut"):
        check_tensor_parallel(shape, Odd(), 2)


def test_without_torchrun_there_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, None)
    world = open_world(layout())
    assert (world.rank, world.size, world.data_size, world.tensor_size, world.mesh) == (0, 1, 1, 1, None)
    assert world.main
    assert not torch.distributed.is_initialized()
    value = torch.ones(())
    assert mean_over_data(value, world) is value
    close_world(world)
