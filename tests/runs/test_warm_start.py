"""``--from``: a run starts from the weights of another, of an adapter, or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import zinit
from tests.tiny import save_records, save_tiny_llama
from zinit.demo import clip_path, vit_path
from zinit.errors import CheckpointError, ConfigError, ZinitError
from zinit.models.loading import load_causal_lm
from zinit.runs.command import command_of
from zinit.runs.config import RunConfig
from zinit.runs.settings import resolve
from zinit.runs.train import Interrupted, train_run
from zinit.train.events import Event, Step

pytestmark = pytest.mark.usefixtures("flags_task")

SMALL = {
    "zero-init": ("prefix.length=3",),
    "v1-multimodal": ("prefix.length=3",),
    "imagebind-llm": ("context.hidden=16", "context.blocks=1", "tuning.lora_rank=2"),
    "v2": ("parts.early.length=3", "parts.late.length=3", "context.hidden=8", "context.blocks=1", "context.heads=2"),
}
STILL = ("learning_rate=0", "steps=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data and what others start from, each of a method: finished runs, and an adapter alone."""
    folder = tmp_path_factory.mktemp("start")
    save_tiny_llama(folder / "model")
    save_tiny_llama(folder / "other-model", seed=1)
    save_records(folder / "data.json")
    for method in ("zero-init", "v2", "lora"):
        train_run(configured(folder, method), folder / method)
    for method, more in (("v1-multimodal", ()), ("imagebind-llm", ("tuning=none",))):
        adapter = configured(folder, method, *more).adapter()
        model, _ = load_causal_lm(folder / "model", dtype=torch.float32)
        zinit.attach(model, adapter, seed=3, encoder=vit_path()).save(folder / method)
    return folder


def configured(folder: Path, method: str, *more: str, start: str | Path | None = None, **given: Any) -> RunConfig:
    """Instructions; with images by ``task="flags"``."""
    options = ["steps=3", "batch_size=6", "learning_rate=0.05", "warmup_steps=0", "save_every=1", "evaluate_every=0",
               "task.evaluation_limit=2", "max_new_tokens=3", *SMALL.get(method, ()), *more]  # fmt: skip
    if method in ("v1-multimodal", "v2", "imagebind-llm"):
        given.setdefault("encoder", str(vit_path()))
        options.append(f"encoder.cache={folder / 'cache'}")
    given = {"task": "alpaca", "model": str(folder / "model"), "data": str(folder / "data.json"), **given}
    start = None if start is None else str(start)
    return resolve(backbone="llama", method=method, warm_start=start, options=options, **given)[0]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {name: x for path in sorted(run.glob("*.safetensors")) for name, x in load_file(path).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[bool]:
    assert one.keys() == other.keys()
    return [torch.equal(one[name], other[name]) for name in one]


@pytest.mark.parametrize("method", ["zero-init", "v1-multimodal", "lora"])
def test_a_run_starts_from_the_weights_of_another(method: str, folder: Path, tmp_path: Path) -> None:
    """At a rate of 0 what comes out is what went in."""
    task = "flags" if method == "v1-multimodal" else "alpaca"
    config = configured(folder, method, *STILL, start=folder / method, task=task)
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    results = train_run(config, tmp_path / "run")
    assert all(same(weights(tmp_path / "run"), weights(folder / method)))
    record = json.loads((tmp_path / "run" / "run.json").read_text())["warm_start"]
    files = {path.name for path in (folder / method).glob("*.safetensors")}
    assert record["source"] == str(folder / method)
    assert record["sha256"] == {
        name: hashlib.sha256((folder / method / name).read_bytes()).hexdigest() for name in files
    }
    assert f"started from {folder / method}" in (tmp_path / "run" / "report.html").read_text()
    if task == "alpaca":
        before = json.loads((folder / method / "metrics.json").read_text())["metrics"]
        assert results["metrics"] == before, "the adapted model is the one that was trained, the base the base"


def test_it_goes_on_training_and_is_resumed_to_the_same_bits(folder: Path, tmp_path: Path) -> None:
    config = configured(folder, "zero-init", start=folder / "zero-init")
    train_run(config, tmp_path / "whole")
    assert not any(same(weights(tmp_path / "whole"), weights(folder / "zero-init")))

    def stop(event: Event) -> None:
        if isinstance(event, Step) and event.step == 1:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        train_run(config, tmp_path / "stopped", on_event=stop)
    shutil.copytree(folder / "zero-init", tmp_path / "moved")
    for other in (configured(folder, "zero-init"), configured(folder, "zero-init", start=tmp_path / "whole")):
        with pytest.raises(CheckpointError, match=rf"started from {folder / 'zero-init'}; expected the same files"):
            train_run(other, tmp_path / "stopped", resume=True)
    train_run(configured(folder, "zero-init", start=tmp_path / "moved"), tmp_path / "stopped", resume=True)
    assert all(same(weights(tmp_path / "whole"), weights(tmp_path / "stopped")))
    command = command_of(config, None)
    assert command is not None
    assert str(folder / "zero-init") in command


def test_a_plain_adapter_is_a_start_and_what_it_lacks_is_fresh(folder: Path, tmp_path: Path) -> None:
    model, _ = load_causal_lm(folder / "model", dtype=torch.float32)
    handle = zinit.attach(model, zinit.PrefixConfig(length=3), seed=3)
    handle.save(tmp_path / "adapter")
    train_run(configured(folder, "zero-init", *STILL, "tuning.bias=true", start=tmp_path / "adapter"), tmp_path / "run")
    found = weights(tmp_path / "run")
    assert all(torch.equal(found[name], tensor) for name, tensor in handle.state_dict().items())
    assert any(name.startswith("tuning.") for name in found)


def test_a_language_half_is_as_it_was_after_captions(folder: Path, tmp_path: Path) -> None:
    """V2, section 3.3: instructions first, then captions alone; texts are answered to the bit as before."""
    joint = ("task.visual=flags", "task.ratios=[1, 0]", "task.visual_options={max_new_tokens=3, evaluation_limit=2}",
             "task.language_options={max_new_tokens=3, evaluation_limit=2}")  # fmt: skip
    given: dict[str, Any] = {"task": "joint", "data": ["none", str(folder / "data.json")]}
    options = ["steps=3", "batch_size=6", "learning_rate=0.05", "warmup_steps=0", "save_every=0", "evaluate_every=0",
               f"encoder.cache={folder / 'cache'}", *SMALL["v2"], *joint]  # fmt: skip
    config = resolve(backbone="llama", method="v2", model=str(folder / "model"), encoder=str(vit_path()),
                     warm_start=str(folder / "v2"), options=options, **given)[0]  # fmt: skip
    results = train_run(config, tmp_path / "run")
    before, after = weights(folder / "v2"), weights(tmp_path / "run")
    visual = {name for name in after if name.startswith(("early.", "shared."))}
    assert all(torch.equal(before[name], after[name]) for name in after.keys() - visual)
    assert not any(torch.equal(before[name], after[name]) for name in visual)
    told = json.loads((folder / "v2" / "metrics.json").read_text())["metrics"]["adapted"]
    assert results["metrics"]["adapted"]["language_rouge_l"] == told["rouge_l"]
    base, _ = load_causal_lm(folder / "model", dtype=torch.float32)
    ids = torch.arange(5, 25).reshape(2, 10)
    frozen, logits = base(input_ids=ids).logits, []
    for run in (folder / "v2", tmp_path / "run"):
        handle = zinit.load(base, run)
        logits.append(base(input_ids=ids).logits)
        handle.detach()
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], frozen)


def test_a_second_stage_starts_from_the_first(folder: Path, tmp_path: Path) -> None:
    """ImageBind-LLM: LoRA, biases and norms train, and all that the first stage has made stays."""
    stages = ("method.stage=tuning", f"method.start={folder / 'imagebind-llm'}")
    config = configured(folder, "imagebind-llm", *stages, task="flags")
    assert config.warm_start == str(folder / "imagebind-llm")
    train_run(config, tmp_path / "run")
    first, second = weights(folder / "imagebind-llm"), weights(tmp_path / "run")
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    own = second.keys() - first.keys()
    assert {name.partition(".")[0] for name in own} == {"tuning"}
    assert all(second[name].abs().sum() > 0 for name in own if name.endswith(("bias", "lora_b")))
    with pytest.raises(ConfigError, match=r"goes on with what a first stage has made \(gates, .*, --from RUN"):
        train_run(configured(folder, "imagebind-llm", "method.stage=tuning", task="flags"), tmp_path / "none")
    model, _ = load_causal_lm(folder / "model", dtype=torch.float32)
    zinit.attach(model, zinit.PrefixConfig(length=1, prompt="table+context")).save(tmp_path / "plain")
    plain = configured(folder, "imagebind-llm", "method.stage=tuning", start=tmp_path / "plain", task="flags")
    with pytest.raises(CheckpointError, match=r"is no first stage of this run: it has no shared\.context\..* others"):
        train_run(plain, tmp_path / "none")


@pytest.mark.parametrize(
    ("method", "more", "start", "message"),
    [
        ("zero-init", ["prefix.length=4"], "zero-init", r"its prefix\.length is 3, and this run's is 4\. .*-o prefix"),
        ("zero-init", ["prefix.gate=identity"], "zero-init", r"its prefix\.gate is 'tanh', and this run's is 'ident"),
        ("zero-init", ["prefix.layers=2"], "zero-init", r"has model\.layers\.0\..* and this run has no such parameter"),
        ("zero-init", ["prefix.length=3"], "v2", r"it has (early|tuning)\..* and this run has no such param"),
        ("v2", ["context.hidden=16"], "v2", r"its context\.hidden is 8, and this run's is 16"),
        ("v2", ["tuning.scale=input"], "v2", r"its tuning\.scale is 'output', and this run's is 'input'"),
        ("lora", [], "zero-init", r"run of the method 'zero-init' and holds no trained\.safetensors, .* 'lora' starts"),
        ("zero-init", [], "lora", r"run of the method 'lora' and holds no adapter\.json, .* 'zero-init' starts from"),
        ("zero-init", [], "gone", r"there is no adapter folder .*gone"),
        ("zero-init", [], "begun", r"has not finished"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    method: str, more: list[str], start: str, message: str, folder: Path, tmp_path: Path
) -> None:
    if start == "begun" and not (folder / start).exists():
        (folder / start).mkdir()
        shutil.copy(folder / "zero-init" / "run.json", folder / start)
    with pytest.raises(ZinitError, match=message):
        train_run(configured(folder, method, *more, start=folder / start), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "nothing was begun"


def test_another_model_encoder_or_method_is_refused(folder: Path, tmp_path: Path) -> None:
    other: dict[str, Any] = {"model": str(folder / "other-model")}
    with pytest.raises(CheckpointError, match="made for other weights of the same shape"):
        train_run(configured(folder, "zero-init", start=folder / "zero-init", **other), tmp_path / "run")
    clip: dict[str, Any] = {"encoder": str(clip_path())}
    with pytest.raises(CheckpointError, match=r"context\.|another encoder"):
        train_run(configured(folder, "v2", start=folder / "v2", **clip), tmp_path / "run")
    solved = resolve(backbone="vit", method="logistic-regression", warm_start=str(folder / "lora"))[0]
    with pytest.raises(ConfigError, match="computes its result and starts from nothing"):
        train_run(solved, tmp_path / "run")
