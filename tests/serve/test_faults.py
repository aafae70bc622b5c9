"""A fault ends the request that it is of, and no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.serve.world import TEXTS, Gate, ask, idle, png
from zinit.models.decoding import Chooser
from zinit.serve.engine import Engine
from zinit.serve.requests import Sampling, Turn


def test_a_receiver_that_fails_ends_its_request_alone(engine: Engine, expected: dict[tuple[str, str], str]) -> None:
    def fails(event: Any) -> None:
        raise RuntimeError("nobody is here")

    ticket = engine.chat("anna", [Turn(role="user", text="b")], Sampling(max_tokens=300), fails)
    assert ask(engine, "bert", TEXTS[0]).wait()[0].answer == expected["bert", TEXTS[0]]
    assert idle(engine)
    assert ticket.cancelled


def test_a_model_that_gives_no_numbers_ends_its_request_alone(
    engine: Engine, expected: dict[tuple[str, str], str]
) -> None:
    broken: Any = engine._models.get("anna").handle
    gates = [prefix.gate for prefix in broken.prefixes.values()]
    before = [gate.clone() for gate in gates]
    try:
        with torch.no_grad():
            for gate in gates:
                gate.fill_(float("nan"))
        with Gate(engine):
            bad, good = ask(engine, "anna", TEXTS[0]), ask(engine, "bert", TEXTS[0])
        assert bad.failure.message == "the model computes no numbers for this prompt."
        assert good.wait()[0].answer == expected["bert", TEXTS[0]]
    finally:
        with torch.no_grad():
            for gate, value in zip(gates, before, strict=True):
                gate.copy_(value)


def test_infinite_numbers_are_none(engine: Engine) -> None:
    head: Any = engine._models.base.lm_head
    hook = head.register_forward_hook(lambda *given: torch.full_like(given[-1], float("inf")))
    try:
        failure = ask(engine, "anna", TEXTS[0], temperature=1.0).failure
    finally:
        hook.remove()
    assert failure.message == "the model computes no numbers for this prompt."


def test_a_token_that_cannot_be_chosen_ends_its_request_alone(
    engine: Engine, expected: dict[tuple[str, str], str]
) -> None:
    """In its first batch, and after some tokens."""
    for after in (0, 3):

        def failing(scores: torch.Tensor, answer: list[int], after: int = after) -> int:
            if len(answer) >= after:
                raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
            return int(scores.argmax())

        with Gate(engine):
            bad, good = ask(engine, "anna", TEXTS[0], temperature=1.0), ask(engine, "bert", TEXTS[0])
            engine._waiting[0].chooser.__class__ = type("Failing", (Chooser,), {"__call__": staticmethod(failing)})
        assert bad.failure.message == "the server has a fault; its log says more."
        assert good.wait()[0].answer == expected["bert", TEXTS[0]]


def test_a_fault_ends_the_requests_that_it_is_of(
    engine: Engine, expected: dict[tuple[str, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: Any) -> None:
        raise RuntimeError("/home/somebody/secret")

    with Gate(engine):
        monkeypatch.setattr(engine._models.get("eyes"), "see", fault)
        bad = ask(engine, "eyes", "x", images=[png((0, 0, 0))])
        good = ask(engine, "bert", TEXTS[0])
    assert bad.failure.message == "the server has a fault; its log says more."
    assert good.wait()[0].answer == expected["bert", TEXTS[0]]
