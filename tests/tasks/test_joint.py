"""Joint training: streams with groups of their own, none of which the other's steps move."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tests.encoders.test_encoders import tower
from tests.tasks.test_images import ADAPTERS
from tests.tiny import byte_tokenizer, records, save_tiny_llama
from zinit import attach
from zinit.config import TuningConfig
from zinit.encoders.cache import FeatureCache
from zinit.errors import ConfigError
from zinit.models.loading import load_causal_lm
from zinit.tasks.base import TaskInputs
from zinit.tasks.joint.config import JointConfig
from zinit.tasks.joint.task import Joint
from zinit.train.batches import load_batches
from zinit.train.config import TrainConfig
from zinit.train.loop import Stepper, fit
from zinit.train.plan import Plan

pytestmark = pytest.mark.usefixtures("flags_task")

KINDS = {**ADAPTERS, "v2": replace(ADAPTERS["context"], tuning=TuningConfig())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("joint")
    (folder / "data.json").write_text(json.dumps(records(30)))
    save_tiny_llama(folder / "model")
    return folder


def make(folder: Path, adapter: str = "context", **settings: Any) -> Joint:
    model, _ = load_causal_lm(folder / "model", dtype=torch.float32)
    handle = attach(model, KINDS[adapter], seed=0, encoder=tower("timm"))
    source: Any = handle.shared["context"]
    features = FeatureCache(handle.get_encoder(), source, root=folder / "cache", limit=1.0)
    data = ("none", str(folder / "data.json"))
    inputs = TaskInputs(model=model, processor=byte_tokenizer(), handle=handle, features=features, data=data)
    own = {"visual_options": {"max_new_tokens": 4}, "language_options": {"max_new_tokens": 4}}
    task = Joint(inputs, JointConfig.from_dict({"visual": "flags", "language": "alpaca", **own, **settings}))
    features.fill(task.image_sources())
    return task


def state(steps: Stepper) -> dict[str, dict[str, torch.Tensor]]:
    """By group, everything that belongs to it: its tensors, and what the optimizer knows of them."""
    assert isinstance(steps.task, Joint)
    assert steps.task.handle is not None
    names = {id(p): name for name, p in steps.task.handle.named_parameters()}
    return {
        group: {
            f"{names[id(p)]}: {key}": torch.as_tensor(value).detach().clone()
            for p in own
            for key, value in {"value": p, **steps.optimizer.optimizer.state.get(p, {})}.items()
        }
        for group, own in steps.task.handle.groups().items()
    }


def take(steps: Stepper, ratios: tuple[float, float]) -> None:
    """Two steps on the streams with these ratios; the optimizer's state stays."""
    task: Any = steps.task
    task.config = replace(task.config, ratios=ratios)
    task.train_stream = task._stream("language")
    steps.plan = Plan.of(task, steps.plan.config, 0)
    batches = load_batches(steps.plan, task.collate, steps.accelerator, start=0)
    for step in range(2):
        steps.step(step, batches)


def trained(task: Joint, steps: int = 3) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Parameters before and after some steps."""
    assert task.handle is not None
    before = {name: tensor.clone() for name, tensor in task.handle.state_dict().items()}
    config = TrainConfig(steps=steps, batch_size=4, micro_batch_size=3, learning_rate=0.05, warmup_steps=0)
    fit(task, config, seed=0, accelerator=Accelerator(cpu=True))
    return before, task.handle.state_dict()


@pytest.mark.parametrize(("ratios", "moves"), [((1, 0), "visual"), ((0, 1), "language")])
def test_steps_of_one_stream_leave_the_other_group_bit_equal(ratios: Any, moves: str, folder: Path) -> None:
    """Its tensors and its moments, which it has from steps on both; there is weight decay, which would move them."""
    task = make(folder, "v2")
    config = TrainConfig(
        steps=4, batch_size=4, micro_batch_size=3, learning_rate=0.05, warmup_steps=0, weight_decay=0.1
    )
    steps = Stepper(task, Plan.of(task, config, 0), Accelerator(cpu=True))
    take(steps, (1, 1))
    before = state(steps)
    take(steps, ratios)
    after = state(steps)
    (other,) = set(before) - {moves}
    assert any("exp_avg_sq" in name for name in before[other]), "else nothing is shown here"
    assert before[other].keys() == after[other].keys()
    assert all(torch.equal(before[other][name], value) for name, value in after[other].items())
    assert not any(torch.equal(before[moves][name], value) for name, value in after[moves].items())


def test_text_answers_are_bit_equal_after_steps_on_images(folder: Path) -> None:
    """V2's language half cannot forget: its parameters are not touched, and texts have no visual tokens."""
    task = make(folder, "v2", ratios=(1, 0))
    ids = torch.tensor([task.language.held_out_examples[0].ids])
    task.eval()
    before = task.model(input_ids=ids).logits
    trained(task)
    task.eval()
    assert torch.equal(task.model(input_ids=ids).logits, before)


def test_both_streams_train_together(folder: Path) -> None:
    before, after = trained(make(folder, ratios=(0.5, 1)))
    assert all(not torch.equal(before[name], after[name]) for name in before)
    shared = make(folder, disjoint=False)
    assert set(shared.groups()) == {"main"}
    assert {stream.group for stream in shared.streams()} == {"main"}
    assert set(make(folder, "table+context").groups()) == {"main"}  # nothing there serves images alone
    groups = make(folder).groups()
    assert {group: set(roles) for group, roles in groups.items()} == {
        "visual": {"gates", "source"},
        "language": {"gates", "prompts"},
    }


def test_a_step_is_the_sum_of_its_streams(folder: Path) -> None:
    """Against gradients by hand, each of its own stream's mean loss and for its own group only."""
    task = make(folder)
    assert task.handle is not None
    config = TrainConfig(steps=1, batch_size=4, micro_batch_size=4, learning_rate=0.1, warmup_steps=0, clip_norm=None,
                         weight_decay=0.0)  # fmt: skip
    stepper = Stepper(task, Plan.of(task, config, 0), Accelerator(cpu=True))
    batches = [task.collate(d.stream, d.examples(0)) for d in stepper.plan.draws]
    expected = {}
    for draws, batch in zip(stepper.plan.draws, batches, strict=True):
        own = task.handle.groups()[draws.stream.group]
        loss = task(batch) / draws.count(0)
        expected |= dict(zip(map(id, own), torch.autograd.grad(loss, own), strict=True))
    seen: dict[int, torch.Tensor] = {}
    update = stepper._update
    stepper._update = lambda step: (  # pyright: ignore[reportAttributeAccessIssue]
        seen.update({id(p): p.grad.clone() for p in task.handle.parameters()}),  # pyright: ignore
        update(step),
    )[1]
    stepper.step(0, iter(batches))
    assert seen.keys() == expected.keys()
    for key, gradient in expected.items():
        assert torch.allclose(seen[key], gradient, atol=1e-5 * float(gradient.abs().max()), rtol=1e-4)


def test_both_are_evaluated(folder: Path) -> None:
    task = make(folder)
    found = task.evaluate(Accelerator(cpu=True), limit=3)
    assert {"visual_exact_match", "language_exact_match", "language_rouge_l"} <= set(found.metrics)
    assert (found.counts["visual_answered"], found.counts["language_answered"]) == (3, 3)
    assert list(task.controls()) == ["shuffled"]
    report = task.data_report()
    assert report["held_out"] == report["visual_held_out"] + report["language_held_out"] == len(task.held_out_stream)
    mixed = task.collate(task.held_out_stream, range(len(task.held_out_stream)))
    apart = [task(child.collate(child.held_out_stream, range(len(child.held_out_stream))))
             for child in (task.visual, task.language)]  # fmt: skip
    assert torch.allclose(task(mixed), torch.stack(apart).sum(), rtol=1e-5)


def test_refusals(folder: Path) -> None:
    with pytest.raises(ConfigError, match="one of them must be above 0"):
        JointConfig(ratios=(0, 0))
    with pytest.raises(ConfigError, match=r"task\.language_options.*no setting 'max_lenght'"):
        JointConfig(language_options={"max_lenght": 3})
    with pytest.raises(ConfigError, match="no task named 'capton'"):
        JointConfig(visual="capton")
    with pytest.raises(ConfigError, match=r"task\.visual=vtab is no task of a causal language model"):
        make(folder, visual="vtab", visual_options={})
    with pytest.raises(ConfigError, match=r"reads two sources.*got 1.*--data twice"):
        Joint.read_data(TaskInputs(model=torch.nn.Linear(1, 1), data="a.json"), JointConfig())
