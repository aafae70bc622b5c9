"""Which examples a step sees, at which rate."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from zinit.errors import ConfigError
from zinit.tasks.base import Stream
from zinit.train import plan as planning
from zinit.train.batches import load_batches
from zinit.train.config import TrainConfig
from zinit.train.plan import Plan

LENGTHS = [(37 * i) % 53 + 5 for i in range(103)]


def plan(**settings) -> Plan:
    config = TrainConfig(**{"epochs": 3, "batch_size": 16, "micro_batch_size": 4, "warmup_epochs": 1, **settings})
    return Plan(config, Stream(name="train", lengths=LENGTHS, counts=[n // 2 for n in LENGTHS]), seed=7)


def test_every_example_comes_once_an_epoch_in_an_order_of_its_own() -> None:
    p = plan()
    assert p.steps_per_epoch == 7
    assert p.steps == 21
    epochs = [[i for s in range(7) for i in p.examples(e * 7 + s)] for e in range(3)]
    assert all(sorted(epoch) == list(range(103)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_order_depends_on_the_seed_and_on_nothing_else() -> None:
    p = plan()
    assert p.examples(9) == plan().examples(9)
    assert p.examples(9) == plan(micro_batch_size=3, learning_rate=1.0).examples(9)
    other = Plan(p.config, p.stream, seed=8)
    assert other.examples(9) != p.examples(9)


def test_the_plan_is_what_it_always_was() -> None:
    """Orders that runs of earlier versions were trained in, and are resumed in."""
    p = plan()
    assert p.examples(6) == [93, 21, 84, 38, 91, 12, 82]
    assert p.examples(20) == [63, 30, 80, 21, 38, 75, 36]
    assert all(isinstance(index, int) for index in p.examples(0))


def mixed(*passes: tuple[int, float], **settings) -> Plan:
    count = sum(number for number, _ in passes)
    config = TrainConfig(**{"epochs": 4, "batch_size": 16, "warmup_epochs": 1, **settings})
    return Plan(config, Stream(name="train", lengths=[5] * count, counts=[1] * count, passes=passes), seed=7)


def epochs_of(p: Plan, count: int) -> list[list[int]]:
    steps = p.steps_per_epoch
    return [[i for s in range(steps) for i in p.examples(e * steps + s)] for e in range(count)]


def test_sources_are_passed_over_as_often_as_their_weights_say() -> None:
    p = mixed((10, 3), (40, 1), (8, 0.25))
    epochs = epochs_of(p, 4)
    for epoch in epochs:
        times = [epoch.count(i) for i in range(58)]
        assert times[:50] == [3] * 10 + [1] * 40
        assert sum(times[50:]) == 2
    assert sorted(i for epoch in epochs for i in epoch if i >= 50) == list(range(50, 58)), "all by the fourth epoch"
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert all(any(i < 10 for i in p.examples(step)) and any(i >= 10 for i in p.examples(step)) for step in range(12))
    assert p.stream.taken == (30, 40, 2)


def test_fractions_of_a_pass_go_on_where_the_last_epoch_ended() -> None:
    seen: Counter[int] = Counter()
    for epoch in epochs_of(mixed((7, 1.5), (0, 2.0), (5, 0.01)), 20):
        seen.update(epoch)
        assert sum(i < 7 for i in epoch) == 10, "round(10.5), to even"
        assert max(seen[i] for i in range(7)) - min(seen[i] for i in range(7)) <= 1
    assert [seen[i] for i in range(7, 12)] == [4] * 5, "at least one an epoch"


def test_the_order_of_several_sources_depends_on_the_step_alone() -> None:
    p = mixed((10, 1.3), (9, 0.7))
    late = p.examples(23)
    planning._order.cache_clear()
    planning._mixed.cache_clear()
    again = mixed((10, 1.3), (9, 0.7), micro_batch_size=3)
    assert again.examples(23) == late
    assert [again.examples(step) for step in range(24)][23] == late
    with pytest.raises(ConfigError, match="do not add up to its 5 examples"):
        Stream(name="train", lengths=[1] * 5, counts=[1] * 5, passes=((4, 1.0),))


def test_no_step_is_planned_before_it_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = plan(steps=10**9, warmup_steps=0)
    planned: list[int] = []
    examples = Plan.examples
    monkeypatch.setattr(Plan, "examples", lambda self, step: planned.append(step) or examples(self, step))
    one_process = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    batches = load_batches(endless, lambda stream, part: {"x": torch.tensor(part)}, one_process, start=10**9 - 2)  # pyright: ignore[reportArgumentType]
    assert next(batches)["x"].tolist() == endless.micro_batches(10**9 - 2, 0, 1)[0][0]
    assert max(planned) == 10**9 - 2
    assert len(planned) < 5


def test_order_does_not_depend_on_what_was_asked_before() -> None:
    """Orders are kept, so that a draw from a common generator would go unseen while they are."""
    p, steps = plan(), [0, 7, 14]
    found = []
    for order in (steps, steps[::-1], [14], [0, 0, 7, 14]):
        planning._order.cache_clear()
        found.append({step: p.examples(step) for step in order})
        planning._order.cache_clear()
        found.append({step: p.examples(step) for step in order[:1]})
    for each in found:
        assert all(found[0][step] == examples for step, examples in each.items())


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("micro", [1, 3, 4, 16, 40])
def test_processes_share_a_step_without_loss_or_repetition(world: int, micro: int) -> None:
    p = plan(micro_batch_size=micro)
    for step in (0, 6, 13):  # 6 and 13 are the short last steps of an epoch: 7 examples
        shares = [p.micro_batches(step, rank, world) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1, "processes would wait for one another"
        assert all(len(part) <= micro for share in shares for part, _ in share)
        counted = sorted(i for share in shares for part, counts in share if counts for i in part)
        assert counted == sorted(p.examples(step))


def test_sorting_by_length_leaves_nearly_no_padding() -> None:
    p = plan(batch_size=103, micro_batch_size=8)
    parts = [part for part, _ in p.micro_batches(0, 0, 1)]
    padded = sum(len(part) * max(LENGTHS[i] for i in part) for part in parts)
    unsorted = sum(
        len(chunk) * max(LENGTHS[i] for i in chunk)
        for chunk in (list(range(a, min(a + 8, 103))) for a in range(0, 103, 8))
    )
    assert padded / sum(LENGTHS) < 1.10
    assert unsorted / sum(LENGTHS) > 1.4


def test_rate_warms_up_linearly_and_falls_as_half_a_cosine() -> None:
    p = plan(learning_rate=0.5)
    rates = [p.learning_rate(step) for step in range(p.steps)]
    warmup, total = 7, 21
    for step, rate in enumerate(rates):
        if step < warmup:
            assert rate == pytest.approx(0.5 * (step + 1) / (warmup + 1))
        else:
            assert rate == pytest.approx(0.25 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))))
    assert rates[0] > 0
    assert max(rates) == rates[7] == 0.5
    assert rates[-1] < 0.01


def test_one_step_runs_at_the_peak() -> None:
    assert plan(steps=1, warmup_steps=0, learning_rate=0.5).learning_rate(0) == 0.5


def test_a_warm_up_as_long_as_the_run_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"warm-up of 7 steps covers the whole run of 5"):
        plan(steps=5)
    default = plan(steps=10, warmup_epochs=None)
    assert default.warmup == 4, "the paper's share: 2 of 5"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 5, "warmup_steps": 5}, r"warmup_steps \(5\) must be fewer than steps \(5\)"),
        ({"epochs": 2, "warmup_epochs": 2.5}, r"warmup_epochs \(2.5\) must be fewer than epochs \(2\)"),
    ],
)
def test_what_can_be_told_without_the_examples_is(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)  # pyright: ignore[reportArgumentType]
    TrainConfig(steps=5, warmup_steps=4)
    TrainConfig(epochs=2, warmup_epochs=2.5, steps=100)  # epochs of unknown length
    TrainConfig(epochs=2, warmup_epochs=2.5, warmup_steps=3)


def test_count_is_of_supervised_units() -> None:
    p = plan()
    assert p.count(3) == sum(LENGTHS[i] // 2 for i in p.examples(3))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("tokens", [1, 57, 120, 400, 10_000])
def test_a_budget_of_tokens_is_kept_and_shared_alike(world: int, tokens: int) -> None:
    p = plan(micro_batch_tokens=tokens)
    for step in (0, 6, 13):
        shares = [p.micro_batches(step, rank, world) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1, "processes would wait for one another"
        counted = sorted(i for share in shares for part, counts in share if counts for i in part)
        assert counted == sorted(p.examples(step))
        for share in shares:
            for part, _ in share:
                assert len(part) == 1 or len(part) * max(LENGTHS[i] for i in part) <= tokens


def test_a_budget_of_tokens_is_used() -> None:
    """No micro-batch could take the next example as well."""
    p = plan(batch_size=103, micro_batch_tokens=400)
    parts = [part for part, _ in p.micro_batches(0, 0, 1)]
    assert all(LENGTHS[part[0]] * (len(part) + 1) > 400 for part in parts[:-1])
    sizes = [len(part) for part in parts]
    assert sizes[0] < sizes[-2], "short examples come in larger numbers"
    assert plan(micro_batch_tokens=400).examples(9) == plan().examples(9)


@pytest.mark.parametrize("tokens", [0, -1, 2.5, True])
def test_a_wrong_budget_is_refused(tokens: float) -> None:
    with pytest.raises(ConfigError, match="micro_batch_tokens must be a whole number"):
        plan(micro_batch_tokens=tokens)
