"""DeepSpeed's ZeRO-3 on two processes (gloo, CPU): the same run as plain data parallelism; each goes on from each."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn

from tests.processes import ROOT, environment
from tests.tiny import save_records, save_tiny_llama
from tests.train.test_strategies import OPTIONS, assert_same_run, cut, make_runs
from zinit.errors import ConfigError
from zinit.runs.directory import read_run
from zinit.runs.evaluate import evaluate_run
from zinit.runs.settings import resolve
from zinit.runs.train import train_run
from zinit.train.config import TrainConfig
from zinit.train.sharding import _without, place_zero3, use_zero3
from zinit.train.strategy import check_prepared, make_accelerator

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
OTHERS = ("ddp", "fsdp2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    model, data = str(save_tiny_llama(folder / "model")), str(save_records(folder / "data.json", 60))
    kinds = {"": OPTIONS, "-checkpointing": [*OPTIONS, "gradient_checkpointing=true"]}
    kinds["-lora"] = [*OPTIONS, "method=lora", "learning_rate=0.01"]

    def all_kinds(strategy: str) -> list[dict[str, Any]]:
        return [
            {"output": str(folder / f"{strategy}{kind}"), "strategy": strategy, "options": options, "model": model,
             "data": data}
            for kind, options in kinds.items()
        ]  # fmt: skip

    def goes_on(first: str, then: str) -> dict[str, Any]:
        copy = cut(folder / first, folder / f"{first}-then-{then}")
        return {"output": str(copy), "strategy": then, "resume": True}

    # DeepSpeed's runs by themselves: it replaces torch's linear function for the rest of a process.
    make_runs([*all_kinds("ddp"), all_kinds("fsdp2")[0]])
    config, _ = resolve(backbone="llama", options=OPTIONS, model=model, data=data)
    train_run(config, folder / "one")
    make_runs(
        [
            *all_kinds("zero3"),
            *(goes_on(first, "zero3") for first in ("one", "ddp", "ddp-lora", "fsdp2")),
            {"output": str(folder / "zero3"), "strategy": "zero3", "evaluate": True},
        ]
    )
    make_runs([goes_on("zero3", then) for then in OTHERS] + [goes_on("zero3-lora", "ddp")])
    return folder


@needs_deepspeed
@pytest.mark.parametrize("kind", ["", "-checkpointing", "-lora"])
def test_zero3_is_ddp(runs: Path, kind: str) -> None:
    assert_same_run(runs / f"zero3{kind}", runs / f"ddp{kind}")
    assert json.loads((runs / f"zero3{kind}" / "run.json").read_text())["strategy"] == "DEEPSPEED"
    if not kind:
        gates = [line for line in (runs / "zero3" / "log.jsonl").read_text().splitlines() if '"gates"' in line]
        assert len(gates) == 10
        ours, theirs = (json.loads((runs / name / "adapter.json").read_text())["model"] for name in ("zero3", "ddp"))
        assert ours == theirs
        assert ours["key_probe"]


@needs_deepspeed
@pytest.mark.parametrize(
    ("first", "then"),
    [("one", "zero3"), ("ddp", "zero3"), ("ddp-lora", "zero3"), ("fsdp2", "zero3"), ("zero3", "ddp"),
     ("zero3", "fsdp2"), ("zero3-lora", "ddp")],
)  # fmt: skip
def test_one_strategy_goes_on_where_the_other_was_killed(runs: Path, first: str, then: str) -> None:
    assert_same_run(runs / f"{first}-then-{then}", runs / first)


@needs_deepspeed
def test_one_process_goes_on_and_evaluates(runs: Path, tmp_path: Path) -> None:
    expected = json.loads((runs / "zero3" / "metrics.json").read_text())["metrics"]
    ours = json.loads((runs / "zero3" / "evaluated.json").read_text())["metrics"]
    alone = evaluate_run(runs / "zero3")["metrics"]
    for part in ("base", "adapted"):
        assert ours[part] == pytest.approx(expected[part], rel=1e-6)
        assert alone[part] == pytest.approx(expected[part], rel=1e-6)
    copy = cut(runs / "zero3", tmp_path / "run")
    train_run(read_run(copy)[0], copy, resume=True)
    assert_same_run(copy, runs / "zero3")


@pytest.mark.integration
@needs_deepspeed
def test_accelerate_launch_with_our_configuration(runs: Path, tmp_path: Path) -> None:
    inputs = ["--backbone", "llama", "--model", str(runs / "model"), "--data", str(runs / "data.json")]
    options = [part for option in OPTIONS for part in ("-o", option)]
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2", "--config_file"]
    done = subprocess.run(
        [sys.executable, *launch, str(ROOT / "configs" / "accelerate" / "deepspeed-zero3.yaml"), "-m", "zinit", "train",
         *inputs, *options, "--output", str(tmp_path / "run")],
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["strategy"] == "DEEPSPEED"
    assert_same_run(tmp_path / "run", runs / "ddp")


def test_deepspeed_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("zinit.train.strategy.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed\. .*: pip install -e '\.\[deepspeed\]'"):
        make_accelerator(TrainConfig())


@needs_deepspeed
def test_one_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="DeepSpeed was asked for, but one process alone cannot shard"):
        make_accelerator(TrainConfig())


@pytest.mark.parametrize(
    ("asked", "settings", "message"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, {}, "needs zero_stage: 3"),
        ({"ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}, {}, "zero3_init_flag: false"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, {}, "offload_param_device: none"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, {}, "train.clip_norm, not gradient_clipping"),
        ({}, {"mixed_precision": "bf16", "compile": True}, "train.mixed_precision=no .*; -o train.compile=false"),
    ],
)
def test_settings_that_zinit_does_not_keep_are_refused(
    asked: dict[str, str], settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for two processes: Accelerate as it is on CPUs, where it takes DeepSpeed for data parallelism."""
    usual = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"}
    for name, value in {**usual, **asked}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.MULTI_CPU)  # to be restored
    state: Any = SimpleNamespace(deepspeed_plugins=None, distributed_type=DistributedType.MULTI_CPU)

    class Two:
        num_processes = 2
        distributed_type = DistributedType.MULTI_CPU

        @property
        def deepspeed_plugin(self) -> Any:
            return self.state.deepspeed_plugins

    two: Any = Two()
    two.state = state
    with pytest.raises(ConfigError, match=message):
        use_zero3(two, TrainConfig(**settings))


def test_a_model_that_was_not_sharded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    plain: Any = SimpleNamespace(is_fsdp2=False, num_processes=2, distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(ConfigError, match="DEEPSPEED over 2 processes was asked for"):
        check_prepared(nn.Linear(2, 2), plain)


def test_a_run_that_trains_most_layers_is_refused() -> None:
    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    model = transformers.LlamaForCausalLM(config)
    task: Any = SimpleNamespace(model=model, handle=None, parameters=model.parameters)
    with pytest.raises(ConfigError, match="this run trains something in most of the host's"):
        place_zero3(task, SimpleNamespace())  # pyright: ignore[reportArgumentType]


def test_what_deepspeed_gets_holds_nothing_that_stays_whole() -> None:
    block = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.LayerNorm(3)))
    inner: Any = block[1]
    assert list(_without(block, set())) == [block]
    assert list(_without(block, {inner[2].bias})) == [block[0], inner[0]]
    assert list(_without(block, set(block.parameters()))) == []
    assert not set(_without(block, {torch.nn.Parameter()})[0].parameters()) ^ set(block.parameters())
