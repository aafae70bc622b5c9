"""What happens in a run, as typed events: lines of ``log.jsonl``, and what the console and the report show.

`Event.to_dict` gives one line of the log, `read_log` reads them all back. Nothing else in zinit parses ``log.jsonl``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self


@dataclass(frozen=True)
class Event:
    """What all events share.

    Attributes:
        kind: the name of the event in the log.
    """

    kind: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: one line of the log."""
        return {"event": self.kind, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Reads what `to_dict` wrote, now or in an earlier version.

        Raises:
            KeyError, TypeError, ValueError: if the values are none of this event.
        """
        return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls)})


Listener = Callable[[Event], None]


@dataclass(frozen=True)
class Stage(Event):
    """A part of the run begins.

    Attributes:
        text: what it does, for people.
    """

    kind = "stage"
    text: str


@dataclass(frozen=True)
class Notice(Event):
    """Something that the user should know, and that does not end the run.

    Attributes:
        text: for people.
    """

    kind = "notice"
    text: str


@dataclass(frozen=True)
class Encoded(Event):
    """Images went through the encoder.

    Attributes:
        done: images of this process so far.
        of: that it has in all.
    """

    kind = "encoded"
    done: int
    of: int


@dataclass(frozen=True)
class PlanMade(Event):
    """The steps ahead are known.

    Attributes:
        steps: of the whole run.
        done: steps done before; not 0 after a resume.
        steps_per_epoch: of the first stream.
    """

    kind = "plan"
    steps: int
    done: int
    steps_per_epoch: int

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls(int(values["steps"]), int(values.get("done") or 0), int(values.get("steps_per_epoch") or 0))


@dataclass(frozen=True)
class _AtStep(Event):
    """An event that says no more than when it happened.

    Attributes:
        step: optimizer steps done.
    """

    step: int

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls(int(values.get("step") or 0))


@dataclass(frozen=True)
class Resumed(_AtStep):
    """The run goes on from a checkpoint."""

    kind = "resume"


@dataclass(frozen=True)
class Stopped(_AtStep):
    """A signal stopped the run; everything is saved."""

    kind = "stop"


@dataclass(frozen=True)
class Ended(_AtStep):
    """The run is finished."""

    kind = "end"


@dataclass(frozen=True, kw_only=True)
class Step(Event):
    """One optimizer step.

    Attributes:
        step: steps done, this one included.
        epoch: passes over the first stream so far.
        loss: mean over the step's supervised units; with several streams the sum of their means.
        lr: the learning rate, before the factors of `TrainConfig.rates`.
        grad_norm: norm of the gradient before clipping.
        supervised: supervised units, over all processes.
        examples: over all processes.
        seconds: of the step.
        examples_per_second: over all processes.
        tokens_per_second: over all processes, padding excluded.
        losses: by stream, where there are several.
        grad_norms: by parameter group, where there are several.
    """

    kind = "step"
    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    supervised: int
    examples: int
    seconds: float
    examples_per_second: float
    tokens_per_second: float
    losses: Mapping[str, float] = field(default_factory=dict)
    grad_norms: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        document = super().to_dict()
        return {name: value for name, value in document.items() if name not in ("losses", "grad_norms") or value}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        numbers = {f.name: number(values.get(f.name)) for f in dataclasses.fields(cls) if f.type in ("int", "float")}
        by_name = {name: _numbers(values.get(name, {})) for name in ("losses", "grad_norms")}
        return cls(**{**numbers, "step": int(values["step"])}, **by_name)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Evaluated(Event):
    """The held-out examples were evaluated.

    Attributes:
        step: optimizer steps done.
        metrics: by name; the loss among them.
    """

    kind = "eval"
    step: int
    metrics: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        return {"event": self.kind, "step": self.step, **self.metrics}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls(int(values["step"]), _numbers({k: v for k, v in values.items() if k not in ("event", "step")}))


@dataclass(frozen=True)
class Gates(Event):
    """Every gate, after squashing.

    Attributes:
        step: optimizer steps done.
        gates: by site, one number per head.
    """

    kind = "gates"
    step: int
    gates: Mapping[str, list[float]]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        gates = {site: [number(gate) for gate in heads] for site, heads in values["gates"].items()}
        return cls(int(values["step"]), gates)


EVENTS: dict[str, type[Event]] = {
    event.kind: event for event in (Stage, Notice, Encoded, PlanMade, Resumed, Step, Evaluated, Gates, Stopped, Ended)
}


@dataclass(frozen=True)
class RunLog:
    """What ``log.jsonl`` says.

    Attributes:
        events: in the order of the file. A resumed run repeats steps: of several events of one step the last counts.
        unreadable: whole lines that are no event. A last line that a kill cut off is not counted.
    """

    events: list[Event] = field(default_factory=list)
    unreadable: int = 0

    def of(self, kind: type[Event]) -> list[Any]:
        """The events of one kind; of several of one step the last, in the order of the steps."""
        last = {event.step: event for event in self.events if isinstance(event, kind)}  # pyright: ignore[reportAttributeAccessIssue]
        return [last[step] for step in sorted(last)]


def read_log(path: Path) -> RunLog:
    """Reads a run's log; one that is not there is empty.

    Args:
        path: of ``log.jsonl``.
    """
    events: list[Event] = []
    unreadable = 0
    if not path.is_file():
        return RunLog()
    with path.open("rb") as lines:
        for line in lines:
            try:
                document = json.loads(line)
                kind = EVENTS.get(document["event"])  # a kind of another version is no fault
                events += [] if kind is None else [kind.from_dict(document)]
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
                unreadable += line.endswith(b"\n") and bool(line.strip())
    return RunLog(events, unreadable)


def number(value: Any) -> float:
    """A number from JSON; NaN for anything else, such as the null of a loss that was not finite."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.inf


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {name: number(value) for name, value in values.items()}
