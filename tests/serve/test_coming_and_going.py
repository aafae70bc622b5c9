"""Requests leave and adapters come and go while others answer."""

from __future__ import annotations

import threading
from typing import Any

import pytest

import zinit
from tests.contract.test_generation import nothing_is_kept
from tests.serve.world import ALL, TEXTS, Asked, Gate, ask, folders, idle, limits, models, talk
from zinit.errors import CheckpointError, ConfigError
from zinit.serve.engine import Engine
from zinit.serve.requests import Refused, Sampling
from zinit.serve.served import Models


def test_a_cancelled_request_leaves_and_the_others_stay(engine: Engine, expected: dict[tuple[str, str], str]) -> None:
    gone, waiting = ask(engine, "anna", "b", max_tokens=300), Asked()
    other = ask(engine, "bert", TEXTS[0])
    gone.begun.wait(60)
    with Gate(engine):
        waiting = ask(engine, "base", "c", max_tokens=300)
        for one in (gone, waiting):
            assert one.ticket is not None
            one.ticket.cancel()
    assert other.wait()[0].answer == expected["bert", TEXTS[0]]
    assert idle(engine)
    assert not gone.over.is_set()
    assert not waiting.events


def test_adapters_come_and_go_while_others_answer(engine: Engine, expected: dict[tuple[str, str], str]) -> None:
    key = ("bert", TEXTS[1])
    with Gate(engine):
        asked = [ask(engine, *key) for _ in range(3)]
    engine.load("again", str(folders()["anna"]))
    assert [info.id for info in engine.models()] == ["base", *ALL, "again"]
    assert ask(engine, "again", TEXTS[0]).wait()[0].answer == expected["anna", TEXTS[0]]
    with Gate(engine):
        ended = ask(engine, "again", "d", max_tokens=300)
        late = threading.Thread(target=engine.unload, args=("again",))
        late.start()
    late.join(60)
    assert ended.failure.message == "the model 'again' was taken away."
    assert [one.wait()[0].answer for one in asked] == [expected[key]] * 3
    with pytest.raises(Refused, match="there is no model 'again'"):
        ask(engine, "again", "e")
    with pytest.raises(Refused, match="the base cannot be taken away"):
        engine.unload("base")
    with pytest.raises(ConfigError, match="there is a model named 'anna' already"):
        engine.load("anna", str(folders()["anna"]))
    with pytest.raises(ConfigError, match=r"NAME=FOLDER"):
        engine.load("an/na", str(folders()["anna"]))


@pytest.mark.parametrize("slow", ["zinit.adapter.file._download", "zinit.serve.served.Models._encoder"])
def test_answers_go_on_while_an_adapter_is_loaded(
    engine: Engine, expected: dict[tuple[str, str], str], slow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, end = threading.Event(), threading.Event()
    result = folders()["tuned"] if slow.endswith("_download") else None

    def wait(*_: Any) -> Any:
        loading.set()
        end.wait(30)
        return result

    monkeypatch.setattr(slow, wait)
    thread = threading.Thread(target=engine.load, args=("late", "me/hub" if result else str(folders()["bert"])))
    thread.start()
    assert loading.wait(30)
    asked = ask(engine, "anna", TEXTS[0])
    answered = asked.over.wait(10)
    end.set()
    thread.join(60)
    assert answered
    assert asked.wait()[0].answer == expected["anna", TEXTS[0]]
    assert (
        ask(engine, "late", TEXTS[0]).wait()[0].answer
        == ask(engine, "tuned" if result else "bert", TEXTS[0]).wait()[0].answer
    )
    engine.unload("late")


def test_an_adapter_taken_away_before_a_request_is_in_the_queue_fails_it_alone(
    engine: Engine, expected: dict[tuple[str, str], str]
) -> None:
    engine.load("brief", str(folders()["anna"]))
    served, bad = engine._models.get("brief"), Asked()
    engine.unload("brief")
    with Gate(engine):
        good = ask(engine, "bert", TEXTS[0])
        engine._submit(served, [served.format.prompt(talk("x"))], Sampling(max_tokens=4), bad.deliver)
    assert (bad.failure.status, bad.failure.message) == (404, "the model 'brief' was taken away.")
    assert good.wait()[0].answer == expected["bert", TEXTS[0]]


def test_answers_of_the_base_go_on_when_it_cannot_be_taken_away(
    engine: Engine, expected: dict[tuple[str, str], str]
) -> None:
    with Gate(engine):
        asked, errors = ask(engine, "base", TEXTS[0]), list[Exception]()

        def unload() -> None:
            try:
                engine.unload("base")
            except Refused as error:
                errors.append(error)

        thread = threading.Thread(target=unload)
        thread.start()
        assert any(engine._calls or threading.Event().wait(0.01) for _ in range(500))
    thread.join(60)
    assert asked.wait()[0].answer == expected["base", TEXTS[0]]
    assert len(errors) == 1


def test_an_engine_at_rest_and_one_that_stops_leave_no_scope_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zinit.serve.engine.IDLE", 0.05)
    served = models("anna", "tuned")
    engine = Engine(served, limits()).start()
    try:
        assert ask(engine, "anna", TEXTS[0]).wait()
        assert any(nothing_is_kept(served.base) or threading.Event().wait(0.05) for _ in range(100))
        begun = [ask(engine, name, TEXTS[1], max_tokens=400) for name in ("anna", "tuned", "base")]
        for one in begun:
            assert any(len(one.events) > 3 or threading.Event().wait(0.01) for _ in range(2000))
    finally:
        engine.stop()
    assert [one.failure.status for one in begun] == [503] * 3
    assert nothing_is_kept(served.base)
    for name in ("anna", "tuned"):
        handle = served.get(name).handle
        assert handle is not None
        handle.detach()


def test_adapters_of_another_base_are_refused(tmp_path: Any) -> None:
    from tests.contract.cases import causal_lm

    zinit.attach(causal_lm("Llama"), zinit.PrefixConfig(length=2)).save(tmp_path / "other")
    made = models()
    with pytest.raises(CheckpointError, match="made for other weights of the same shape"):
        made.add("other", str(tmp_path / "other"))
    assert list(made.by_name) == ["base"]
    with pytest.raises(CheckpointError, match="does not say which model it was made for: --model"):
        Models(str(tmp_path / "other"))
