"""What the engine refuses: requests that it cannot take, and those for which there is no room or time."""

from __future__ import annotations

import io
import threading
from typing import Any

import pytest
from PIL import Image

from tests.serve.world import Gate, ask, limits, models, png
from zinit.serve.engine import Engine
from zinit.serve.requests import Refused, Sampling, Turn


def test_what_cannot_be_taken_is_refused(engine: Engine) -> None:
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"model": "anna", "text": "x" * 600}, "the prompt has [0-9]+ tokens; there is room for 511"),
        ({"model": "anna", "text": "x", "n": 65}, "65 answers are more than the 64 allowed"),
        ({"model": "anna", "text": "x", "images": [png((0, 0, 0))]}, "takes no images: it was trained on texts alone"),
        ({"model": "base", "text": "x", "images": [png((0, 0, 0))]}, "takes no images: it is the base"),
        ({"model": "eyes", "text": "x", "images": [b"no"]}, "image 1 is no image that can be read"),
        ({"model": "eyes", "text": "x", "images": [png((0, 0, 0))] * 9}, "9 images are more than the 8 allowed"),
        ({"model": "anna", "text": "\ud800"}, "not valid Unicode"),
    ]
    for given, message in refusals:
        with pytest.raises(Refused, match=message):
            ask(engine, given.pop("model"), given.pop("text"), **given)
    small = Engine(engine._models, limits(pixels=100))
    with pytest.raises(Refused, match="would unpack to 11 x 11 pixels"):
        ask(small, "eyes", "x", images=[png((0, 0, 0), 11)])
    strip = io.BytesIO()
    Image.new("RGB", (1, 5000)).save(strip, "PNG")
    with pytest.raises(Refused, match="1 x 5000 pixels: one side is more than 50 times as long"):
        ask(engine, "eyes", "x", images=[strip.getvalue()])
    with pytest.raises(Refused, match="trained without a place for a system text"):
        engine.chat("anna", [Turn(role="system", text="s"), Turn(role="user", text="u")], Sampling(), print)
    for roles in (("assistant",), ("user", "user"), ("user", "assistant"), ("user", "system", "user"), ()):
        with pytest.raises(Refused, match=r"the user's first and last|must come first"):
            engine.chat("talk", [Turn(role=role, text="x") for role in roles], Sampling(), print)


def test_the_queue_and_the_time_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(models("anna", "eyes"), limits(batch=1, queue=2, seconds=0.2)).start()
    with Gate(engine):
        late = [ask(engine, "anna", "a") for _ in range(2)]
        with pytest.raises(Refused, match=r"2 answers are waiting already. Try again later") as refused:
            ask(engine, "anna", "a")
        assert refused.value.status == 429
        monkeypatch.setattr("zinit.serve.engine.check_image", lambda *_, **__: pytest.fail("images are looked at"))
        with pytest.raises(Refused, match="2 answers are waiting already"):
            ask(engine, "eyes", "a", images=[png((0, 0, 0))])
        threading.Event().wait(0.3)
    assert {one.failure.status for one in late} == {429}
    with Gate(engine):
        asked = ask(engine, "anna", "a")
    engine.stop()
    assert asked.over.is_set()
    with pytest.raises(Refused, match="going down"):
        ask(engine, "anna", "a")


def test_who_left_the_queue_takes_no_room() -> None:
    engine = Engine(models("anna"), limits(batch=1, queue=2)).start()
    try:
        with Gate(engine):
            for _ in range(3):
                left = [ask(engine, "anna", "a") for _ in range(2)]
                for one in left:
                    assert one.ticket is not None
                    one.ticket.cancel()
            stayed = ask(engine, "anna", "a")
        assert stayed.wait()
    finally:
        engine.stop()


def test_the_queue_is_looked_through_while_no_answer_ends() -> None:
    engine = Engine(models("anna"), limits(batch=0, seconds=0.3)).start()
    try:
        left, late = ask(engine, "anna", "a", n=3), ask(engine, "anna", "a")
        assert left.ticket is not None
        left.ticket.cancel()
        assert any(engine.gauges()["waiting"] <= 1 or threading.Event().wait(0.01) for _ in range(500))
        assert late.over.wait(10)
        assert late.failure.status == 429
    finally:
        engine.stop()
