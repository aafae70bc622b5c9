"""Events: the lines of the log are what they were, and every line that can be read is read back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.train.joint import Joint, trained
from tests.train.test_fit import Regression
from zinit.config import to_json
from zinit.train.events import (
    EVENTS,
    Encoded,
    Ended,
    Evaluated,
    Event,
    Gates,
    Notice,
    PlanMade,
    Resumed,
    Stage,
    Step,
    Stopped,
    read_log,
)

STEP = Step(
    step=3,
    epoch=0.5,
    loss=1.25,
    lr=0.01,
    grad_norm=2.0,
    supervised=40,
    examples=8,
    seconds=0.5,
    examples_per_second=16.0,
    tokens_per_second=100.0,
)
LINES: list[tuple[Event, str]] = [
    (Stage("loading"), '{"event": "stage", "text": "loading"}'),
    (Encoded(3, 7), '{"event": "encoded", "done": 3, "of": 7}'),
    (Notice("mind"), '{"event": "notice", "text": "mind"}'),
    (PlanMade(7, 2, 4), '{"event": "plan", "steps": 7, "done": 2, "steps_per_epoch": 4}'),
    (Resumed(2), '{"event": "resume", "step": 2}'),
    (
        STEP,
        '{"event": "step", "step": 3, "epoch": 0.5, "loss": 1.25, "lr": 0.01, "grad_norm": 2.0, "supervised": 40, '
        '"examples": 8, "seconds": 0.5, "examples_per_second": 16.0, "tokens_per_second": 100.0}',
    ),
    (Gates(3, {"a.0": [0.5, -0.5]}), '{"event": "gates", "step": 3, "gates": {"a.0": [0.5, -0.5]}}'),
    (Evaluated(3, {"loss": 2.0, "count": 9}), '{"event": "eval", "step": 3, "loss": 2.0, "count": 9}'),
    (Stopped(3), '{"event": "stop", "step": 3}'),
    (Ended(7), '{"event": "end", "step": 7}'),
]


def test_every_event_is_here() -> None:
    assert {type(event) for event, _ in LINES} == set(EVENTS.values())


@pytest.mark.parametrize(("event", "line"), LINES, ids=lambda found: getattr(found, "kind", ""))
def test_a_line_of_the_log(event: Event, line: str, tmp_path: Path) -> None:
    """As runs have always written it, and read back as the same event."""
    assert to_json(event.to_dict()) == line
    (tmp_path / "log.jsonl").write_text(line + "\n")
    assert read_log(tmp_path / "log.jsonl").events == [event]


def test_a_torn_line_is_passed_over_and_whole_ones_that_are_none_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    assert read_log(path).events == []
    whole = [line for _, line in LINES]
    wrong = ['{"event": "st', "[]", '"x"', '{"event": "step"}', '{"event": "gates", "step": 1, "gates": 5}', "{}"]
    later = '{"event": "of a later version", "step": "x"}'
    path.write_text("\n".join([*whole[:3], *wrong, "", later, *whole[3:], '{"event": "step", "step": 4, "lo']))
    found = read_log(path)
    assert found.events == [event for event, _ in LINES]
    assert found.unreadable == len(wrong)


def test_numbers_that_json_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(
        '{"event": "step", "step": 1, "loss": null, "grad_norm": "x"}\n{"event": "eval", "step": 1, "loss": NaN}'
    )
    step, evaluated = read_log(path).events
    assert isinstance(step, Step)
    assert isinstance(evaluated, Evaluated)
    assert all(map(math.isnan, (step.loss, step.grad_norm, step.seconds, evaluated.metrics["loss"])))


def test_of_steps_that_a_resumed_run_repeats_the_last_counts(tmp_path: Path) -> None:
    lines = [{"event": "step", "step": step, "loss": loss} for step, loss in ((2, 1), (3, 2), (1, 3), (2, 4))]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [(step.step, step.loss) for step in read_log(tmp_path / "log.jsonl").of(Step)] == [(1, 3), (2, 4), (3, 2)]


def test_streams_and_groups_are_told_where_there_are_several(tmp_path: Path) -> None:
    alone, joint = trained(Regression(), epochs=1), trained(Joint(), epochs=1)
    assert not {"losses", "grad_norms"} & alone[0].to_dict().keys()
    assert joint[0].losses.keys() == joint[0].grad_norms.keys() == {"left", "right"}
    (tmp_path / "log.jsonl").write_text(to_json(joint[0].to_dict()) + "\n")
    assert read_log(tmp_path / "log.jsonl").events == [joint[0]]
