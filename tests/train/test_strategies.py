"""DDP and FSDP2 on two processes (gloo, CPU), and one process: the same run, whichever saves and whichever goes on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import nn

from tests.processes import ROOT, environment, run, run_ranks
from tests.tiny import save_records, save_tiny_llama
from tests.train.test_crash import steps
from zinit.adapter.attach import attach
from zinit.config import PrefixConfig
from zinit.errors import ConfigError
from zinit.runs.directory import read_run
from zinit.runs.evaluate import evaluate_run
from zinit.runs.settings import resolve
from zinit.runs.train import train_run
from zinit.train.config import TrainConfig
from zinit.train.sharding import _kept_whole, kinds_of_blocks, use_fsdp2
from zinit.train.strategy import check_prepared, make_accelerator

OPTIONS = ["steps=9", "batch_size=7", "micro_batch_size=2", "save_every=6", "evaluate_every=4", "warmup_steps=2",
           "task.evaluation_limit=3", "task.max_new_tokens=4", "learning_rate=0.05",
           "prefix.gate_init=random"]  # fmt: skip
TUNED = ("method=zero-init-tuned", "tuning.lora_rank=2", "learning_rate=0.02")
STRATEGIES = ("ddp", "fsdp2")


def make_runs(runs: list[dict[str, Any]]) -> None:
    done = run_ranks("tests.train.strategies", json.dumps(runs))
    assert done.returncode == 0, done.stderr


def cut(run: Path, copy: Path) -> Path:
    """A copy of a run as if it had been killed after step 6."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "resume" / "step-00000009")
    for name in ("adapter.safetensors", "adapter.json", "trained.safetensors"):
        (copy / name).unlink(missing_ok=True)
    return copy


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    model = str(save_tiny_llama(folder / "model"))
    inputs = {"model": model, "data": str(save_records(folder / "data.json", 60))}
    first = []
    for name in STRATEGIES:
        kinds = {
            name: OPTIONS,
            f"{name}-checkpointing": [*OPTIONS, "gradient_checkpointing=true"],
            f"{name}-full": [*OPTIONS, "method=full", "learning_rate=0.001"],
            f"{name}-tuned": [*OPTIONS, *TUNED],
        }
        first += [
            {"output": str(folder / kind), "strategy": name, "options": options, **inputs}
            for kind, options in kinds.items()
        ]
    make_runs(first)
    for kind, options in (("", OPTIONS), ("-tuned", [*OPTIONS, *TUNED])):
        config, _ = resolve(backbone="llama", options=options, model=model, data=inputs["data"])
        train_run(config, folder / f"one{kind}")
    again = []
    for two in STRATEGIES:
        again.append({"output": str(cut(folder / "one", folder / f"one-then-{two}")), "strategy": two, "resume": True})
    for one, other in (STRATEGIES, STRATEGIES[::-1]):
        for kind in ("", "-full"):
            copy = cut(folder / f"{one}{kind}", folder / f"{one}{kind}-then-{other}")
            again.append({"output": str(copy), "strategy": other, "resume": True})
    for kind in ("", "-full"):
        again.append({"output": str(folder / f"fsdp2{kind}"), "strategy": "fsdp2", "evaluate": True})
    make_runs(again)
    return folder


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["", "-full"])
def test_a_finished_run_is_evaluated_as_it_was(runs: Path, kind: str) -> None:
    expected = json.loads((runs / f"fsdp2{kind}" / "metrics.json").read_text())["metrics"]
    found = json.loads((runs / f"fsdp2{kind}" / "evaluated.json").read_text())["metrics"]
    for part in ("base", "adapted"):
        assert found[part] == pytest.approx(expected[part], rel=1e-6)
    assert evaluate_run(runs / f"fsdp2{kind}")["metrics"]["adapted"] == pytest.approx(expected["adapted"], rel=1e-6)


def weights(run: Path) -> dict[str, torch.Tensor]:
    names = [name for name in ("adapter.safetensors", "trained.safetensors") if (run / name).exists()]
    assert names
    return {key: value for name in names for key, value in load_file(run / name).items()}


def assert_same_run(found: Path, expected: Path) -> None:
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-6)
    one, two = steps(found), steps(expected)
    assert list(one) == list(two) == list(range(1, 10))
    assert max(abs(one[step] - two[step]) for step in one) < 1e-6 * max(one.values())
    for kind in ("grad_norm", "eval"):
        ours, theirs = (numbers(run, kind) for run in (found, expected))
        assert ours == pytest.approx(theirs, rel=1e-5)
    ours, theirs = (json.loads((run / "metrics.json").read_text()) for run in (found, expected))
    for part in ("base", "adapted"):
        assert ours["metrics"][part] == pytest.approx(theirs["metrics"][part], rel=1e-6)
    assert ours["samples"] == theirs["samples"]  # the generated answers
    assert len(ours["samples"]) == 3


def numbers(run: Path, kind: str) -> dict[int, float]:
    """Norms of the gradient by step, or held-out losses."""
    events = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    name = "step" if kind == "grad_norm" else "eval"
    key = "grad_norm" if kind == "grad_norm" else "loss"
    return {event["step"]: event[key] for event in events if event["event"] == name}


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["", "-tuned"])
def test_two_processes_are_one(runs: Path, kind: str) -> None:
    assert_same_run(runs / f"ddp{kind}", runs / f"one{kind}")
    assert any(name.startswith("tuning.") for name in weights(runs / f"one{kind}")) == (kind == "-tuned")


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["", "-checkpointing", "-full", "-tuned"])
def test_fsdp2_is_ddp(runs: Path, kind: str) -> None:
    assert_same_run(runs / f"fsdp2{kind}", runs / f"ddp{kind}")
    for name, strategy in (("ddp", "MULTI_CPU"), ("fsdp2", "FSDP")):
        assert json.loads((runs / f"{name}{kind}" / "run.json").read_text())["strategy"] == strategy
    gates = [json.loads(line) for line in (runs / "fsdp2" / "log.jsonl").read_text().splitlines() if '"gates"' in line]
    assert len(gates) == 10
    # The sample of the host's weights, which guards against another base, is there though the host was sharded.
    ours, theirs = (json.loads((runs / name / "adapter.json").read_text())["model"] for name in STRATEGIES)
    assert ours == theirs
    assert ours["key_probe"]


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["", "-full"])
@pytest.mark.parametrize(("one", "other"), [STRATEGIES, STRATEGIES[::-1]])
def test_one_strategy_goes_on_where_the_other_was_killed(runs: Path, one: str, other: str, kind: str) -> None:
    assert_same_run(runs / f"{one}{kind}-then-{other}", runs / f"{one}{kind}")


@pytest.mark.integration
@pytest.mark.parametrize("one", STRATEGIES)
def test_one_process_goes_on_where_two_were_killed(runs: Path, tmp_path: Path, one: str) -> None:
    copy = cut(runs / one, tmp_path / "run")
    train_run(read_run(copy)[0], copy, resume=True)
    assert_same_run(copy, runs / one)


@pytest.mark.integration
@pytest.mark.parametrize("two", STRATEGIES)
def test_two_processes_go_on_where_one_was_killed(runs: Path, two: str) -> None:
    assert_same_run(runs / f"one-then-{two}", runs / "one")


@pytest.mark.integration
@pytest.mark.parametrize(("name", "strategy"), [("ddp", "MULTI_CPU"), ("fsdp2", "FSDP")])
def test_accelerate_launch_with_our_configurations(runs: Path, tmp_path: Path, name: str, strategy: str) -> None:
    inputs = ["--backbone", "llama", "--model", str(runs / "model"), "--data", str(runs / "data.json")]
    options = [part for option in OPTIONS for part in ("-o", option)]
    launch = ["accelerate.commands.accelerate_cli", "launch", "--num_processes", "2"]
    config = ["--config_file", str(ROOT / "configs" / "accelerate" / f"{name}.yaml")]
    train = ["-m", "zinit", "train", *inputs, *options, "--output", str(tmp_path / "run")]
    if name == "ddp":  # interpreters of its own, as a user's launch starts them
        done = subprocess.run(
            [sys.executable, "-m", *launch, *config, *train],
            env=environment(), capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    else:
        done = run("tests.launch", *launch, *config, *train)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (document["processes"], document["strategy"]) == (2, strategy)
    assert_same_run(tmp_path / "run", runs / name)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "one process alone cannot shard"),
    ],
)
def test_what_cannot_run_is_refused(asked: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        make_accelerator(TrainConfig())


@pytest.mark.parametrize(
    ("asked", "settings", "message"),
    [
        ({"FSDP_VERSION": "1"}, {}, "FSDP1 is not supported. Set fsdp_version: 2"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "fsdp_cpu_ram_efficient_loading: false"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "train.gradient_checkpointing=true"),
        ({}, {"mixed_precision": "bf16", "compile": True}, "train.mixed_precision=no .*; -o train.compile=false"),
    ],
)
def test_fsdp_that_zinit_cannot_keep_its_promises_under_is_refused(
    asked: dict[str, str], settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for two processes: Accelerate as it is on CPUs, where it takes FSDP for plain data parallelism."""
    for name, value in {"FSDP_VERSION": "2", **asked}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.MULTI_CPU)  # to be restored
    state = SimpleNamespace(fsdp_plugin=None, distributed_type=DistributedType.MULTI_CPU)

    class Two:
        num_processes = 2
        distributed_type = DistributedType.MULTI_CPU
        state: Any = None

        @property
        def is_fsdp2(self) -> bool:
            return self.state.distributed_type == DistributedType.FSDP and self.state.fsdp_plugin.fsdp_version == 2

    two: Any = Two()
    two.state = state
    with pytest.raises(ConfigError, match=message):
        use_fsdp2(two, TrainConfig(**settings))


def test_another_strategy_than_the_one_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    plain: Any = SimpleNamespace(is_fsdp2=True, num_processes=2, distributed_type=DistributedType.FSDP)
    with pytest.raises(ConfigError, match=r"FSDP over 2 processes was asked for, but .* prepared as Linear"):
        check_prepared(nn.Linear(2, 2), plain)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    plain.is_fsdp2, plain.distributed_type = False, DistributedType.MULTI_GPU
    with pytest.raises(ConfigError, match="prepared as Linear"):
        check_prepared(nn.Linear(2, 2), plain)


def test_blocks_are_found_in_every_kind_of_host() -> None:
    with torch.device("meta"):
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(hidden_size=32, num_hidden_layers=3))
        clip = transformers.CLIPModel(transformers.CLIPConfig())
        vit = timm.create_model("vit_tiny_patch16_224")
    assert kinds_of_blocks(llama) == {"LlamaDecoderLayer"}
    assert kinds_of_blocks(clip) == {"CLIPEncoderLayer"}
    assert kinds_of_blocks(vit) == {"Block"}
    assert kinds_of_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == set()


def test_little_stays_whole_and_much_is_sharded() -> None:
    """A prefix and what lies outside the blocks always; what else trains inside only up to a tenth of it."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    )
    handle = attach(model, PrefixConfig(length=40))
    task: Any = SimpleNamespace(model=model, handle=handle, parameters=model.parameters)
    blocks: list[Any] = list(model.model.layers)
    outside = {model.lm_head.weight, model.model.embed_tokens.weight, model.model.norm.weight}
    assert set(_kept_whole(task, blocks)) == outside | set(handle.parameters())
    norms = {layer.input_layernorm.weight.requires_grad_() for layer in blocks}
    assert set(_kept_whole(task, blocks)) == outside | set(handle.parameters()) | norms
    model.requires_grad_()
    assert set(_kept_whole(task, blocks)) == outside | set(handle.parameters())
