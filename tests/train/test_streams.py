"""Steps on several streams: each trains its own group of parameters, and leaves the others as they are to the bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.processes import run as run_process
from tests.processes import run_ranks
from tests.train.joint import SETTINGS, Joint, trained
from tests.train.test_fit import Regression
from zinit.errors import ConfigError
from zinit.runs.settings import resolve
from zinit.tasks.base import Stream
from zinit.train.batches import load_batches
from zinit.train.config import RatesConfig, TrainConfig
from zinit.train.loop import Stepper
from zinit.train.plan import Plan


def stepper(task: Joint, **settings: Any) -> Stepper:
    return Stepper(task, Plan.of(task, TrainConfig(**{**SETTINGS, **settings}), 3), Accelerator(cpu=True))


def take(steps: Stepper, ratios: tuple[float, float], count: int) -> None:
    """Takes steps on the streams with these ratios; the optimizer's state stays."""
    steps.task.ratios = ratios
    steps.plan = Plan.of(steps.task, steps.plan.config, 3)
    batches = load_batches(steps.plan, steps.task.collate, steps.accelerator, start=0)
    for step in range(count):
        steps.step(step, batches)


def state(steps: Stepper, group: str) -> dict[str, Tensor]:
    """Everything that belongs to a group: its tensors, and what the optimizer knows of them."""
    found = {}
    for name, parameter in steps.task.named_parameters():
        if group in name:
            found[name] = parameter.detach().clone()
            kept = steps.optimizer.optimizer.state.get(parameter, {})
            found |= {f"{name}: {key}": torch.as_tensor(value).clone() for key, value in kept.items()}
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[bool]:
    assert one.keys() == other.keys()
    return [torch.equal(value, other[name]) for name, value in one.items()]


@pytest.mark.parametrize(("ratios", "still", "moving"), [((1, 0), "right", "left"), ((0, 1), "left", "right")])
def test_a_group_without_its_stream_stays_as_it_is(ratios: tuple[float, float], still: str, moving: str) -> None:
    """Its tensors, its moments, its count of steps; there is weight decay, which a gradient of zeros would apply."""
    steps = stepper(Joint())
    take(steps, (1, 1), 2)
    before = {group: state(steps, group) for group in ("left", "right")}
    assert any("exp_avg_sq" in name for name in before[still]), "else nothing is shown here"
    take(steps, ratios, 2)
    assert all(same(state(steps, still), before[still]))
    assert not any(same(state(steps, moving), before[moving]))


def test_each_group_gets_the_gradient_of_its_own_stream() -> None:
    """Against plain AdamW on gradients that autograd takes for each group alone."""
    task, reference = Joint(dropout=0.0), Joint(dropout=0.0)
    found = trained(task, micro_batch_size=8, clip_norm=0.7)
    plan = Plan.of(reference, TrainConfig(**{**SETTINGS, "clip_norm": 0.7}), 3)
    groups = reference.groups()
    optimizers = {
        name: torch.optim.AdamW(
            [
                {"params": roles["head"], "weight_decay": 0.1},
                {"params": roles["gates"], "weight_decay": 0.0},
            ],
            betas=(0.9, 0.95),
        )
        for name, roles in groups.items()
    }
    for step, measured in enumerate(found):
        for draws in plan.draws:
            name = draws.stream.name
            own = [*groups[name]["head"], *groups[name]["gates"]]
            loss = reference(reference.collate(draws.stream, draws.examples(step))) / draws.count(step)
            for parameter, gradient in zip(own, torch.autograd.grad(loss, own), strict=True):
                parameter.grad = gradient
            norm = nn.utils.clip_grad_norm_(own, 0.7)
            assert measured.losses[name] == pytest.approx(loss.item(), rel=1e-6)
            assert measured.grad_norms[name] == pytest.approx(norm.item(), rel=1e-6)
        assert measured.loss == pytest.approx(sum(measured.losses.values()))
        assert measured.grad_norm == pytest.approx(math.hypot(*measured.grad_norms.values()))
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate(step)
            optimizer.step()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(dict(task.named_parameters())[name], parameter, rtol=1e-6, atol=1e-7)


def test_one_group_is_plain_adamw_to_the_bit() -> None:
    task, reference = Regression(), Regression()
    settings = {"epochs": 4, "batch_size": 8, "micro_batch_size": 8, "learning_rate": 0.05, "warmup_steps": 3}
    steps = trained(task, **settings, clip_norm=1.0)
    plan = Plan.of(reference, TrainConfig(**{**SETTINGS, **settings, "clip_norm": 1.0}), 3)
    own = list(reference.model[2].parameters())
    optimizer = torch.optim.AdamW(own, lr=0.05, betas=(0.9, 0.95), weight_decay=0.1)
    for step, measured in enumerate(steps):
        loss = reference(reference.collate(reference.train_stream, plan.examples(step)))
        (loss * (1 / plan.count(step))).backward()
        norm = nn.utils.clip_grad_norm_(own, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        assert (measured.loss, measured.grad_norm) == ((loss.detach() / plan.count(step)).item(), norm.item())
    assert len(steps) == 12
    assert all(same(dict(task.named_parameters()), dict(reference.named_parameters())))
    assert not steps[0].losses
    assert "losses" not in steps[0].to_dict()


def test_ratios_are_of_examples_and_epochs_count_the_first() -> None:
    plan = Plan.of(Joint((1, 0.5)), TrainConfig(**SETTINGS), 3)
    assert (plan.steps_per_epoch, plan.steps) == (3, 6)
    left, right = plan.draws
    assert [len(left.examples(step)) for step in range(6)] == [8, 8, 6, 8, 8, 6]
    assert [len(right.examples(step)) for step in range(6)] == [4] * 6
    seen = [index for step in range(6) for index in right.examples(step)]
    assert len(set(seen)) == 24, "no example comes again before all have come"
    assert Plan.of(Joint((0, 1)), TrainConfig(**SETTINGS), 3).steps_per_epoch == 4
    alone = Plan.of(Joint((0, 0.5)), TrainConfig(**SETTINGS), 3)
    assert alone.examples(0) == right.examples(0), "a stream's order depends on no other stream"


def test_rates_by_role_and_by_group_and_role() -> None:
    """The first step of Adam is as long as the rate."""
    rates = RatesConfig.from_dict({"gates": 0.5, "left": {"head": 0.0}, "right": {"gates": 3}})
    task, before = Joint(dropout=0.0), Joint(dropout=0.0)
    trained(task, steps=1, warmup_steps=0, weight_decay=0.0, rates=rates)
    moved = {
        name: (parameter - dict(before.named_parameters())[name]).abs().mean().item()
        for name, parameter in task.named_parameters()
    }
    expected = {
        "gates.left": 0.5,
        "gates.right": 3,
        **{f"model.left.{name}": 0 for name in ("weight", "bias")},
        **{f"model.right.{name}": 1 for name in ("weight", "bias")},
    }
    assert moved == {name: pytest.approx(0.05 * factor, rel=1e-4) for name, factor in expected.items()}


def test_rates_are_settings() -> None:
    options = ["train.rates.gates=0.3", "train.rates.visual.gates=0.1"]
    config, _ = resolve(backbone="llama", options=options)
    assert config.train.rates == RatesConfig(gates=0.3, groups={"visual": {"gates": 0.1}})
    assert config.to_dict()["train"]["rates"] == {
        **{"gates": 0.3, "prompts": 1.0, "source": 1.0, "tuning": 1.0, "head": 1.0},
        "visual": {"gates": 0.1},
    }
    assert type(config).from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match=r"\[train.rates\].*no group 'visual'. Its groups: left, right"):
        Plan.of(Joint(), config.train, 0)
    for wrong, message in (
        ({"visual": {"gate": 1}}, "the group 'visual' has no setting 'gate'. Did you mean 'gates'"),
        ({"gate": 1}, "no setting 'gate'. Did you mean 'gates'"),
        ({"gates": -1}, "gates must be a number of at least 0"),
        ({"visual": {"gates": "fast"}}, "groups must be a table"),
    ):
        with pytest.raises(ConfigError, match=message):
            RatesConfig.from_dict(wrong)
    assert "prompts" in resolve(backbone="llama", options=["prompts=table"])[0].prefix.to_dict()


def run(*arguments: str | Path, processes: int = 1) -> int:
    start = run_process if processes == 1 else run_ranks
    return start("tests.train.joint", *arguments).returncode


@pytest.mark.integration
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    assert run(tmp_path / "straight") == 0
    assert run(tmp_path / "killed", "--kill", "4") < 0
    assert not (tmp_path / "killed" / "end.safetensors").exists()
    assert run(tmp_path / "killed", "--resume") == 0
    assert all(same(*(load_file(tmp_path / name / "end.safetensors") for name in ("straight", "killed"))))


@pytest.mark.integration
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    for processes in (1, 2):
        assert run(tmp_path / str(processes), "--dropout", "0", processes=processes) == 0
    one, two = (load_file(tmp_path / str(processes) / "end.safetensors") for processes in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-6)


def changed(**methods: Any) -> Joint:
    return type("Changed", (Joint,), methods)()


def stream(**settings: Any) -> Stream:
    return Stream(**{"name": "left", "lengths": [4], "counts": [1], "group": "left", **settings})


@pytest.mark.parametrize(
    ("streams", "message"),
    [
        ([stream(group="middle")], "trains the group 'middle', which the task has not. Its groups: left, right"),
        ([stream(), stream()], "names of their own; got left, left"),
        ([stream(ratio=0)], "every stream has the ratio 0"),
        ([stream(lengths=[], counts=[])], "the stream 'left' has no examples"),
    ],
)
def test_streams_that_cannot_be_trained_on(streams: list[Stream], message: str) -> None:
    task = Joint()
    task.streams = lambda: streams  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConfigError, match=message):
        Plan.of(task, TrainConfig(**SETTINGS), 3)


@pytest.mark.parametrize("ratio", [-1, math.nan, math.inf])
def test_a_ratio_that_is_none(ratio: float) -> None:
    with pytest.raises(ConfigError, match="ratio of the stream 'left' must be a number from 0 on"):
        stream(ratio=ratio)


def test_every_parameter_is_in_one_group() -> None:
    task = Joint()
    groups = task.groups()
    task.groups = lambda: {"left": groups["left"]}  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConfigError, match=r"model\.right\.weight, .* are in none of the task's groups"):
        list(task.parameter_groups(0.1, decay_gates=False))
    task.groups = lambda: groups | {"again": groups["left"]}  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConfigError, match=r"gates\.left is in two groups, left\.gates and again\.gates"):
        list(task.parameter_groups(0.1, decay_gates=False))


def test_a_stream_whose_loss_is_not_of_its_group() -> None:
    task = changed(forward=lambda self, batch: self.model["left"](batch["x"]).sum())
    with pytest.raises(ConfigError, match="loss of the stream 'right' depends on no parameter of the group 'right'"):
        trained(task)


def test_several_groups_on_a_sharded_host_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zinit.train.loop.is_sharded", lambda accelerator: True)
    with pytest.raises(ConfigError, match=r"several groups of parameters \(left, right\), which needs plain data"):
        stepper(Joint())
