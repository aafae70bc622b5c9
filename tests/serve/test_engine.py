"""The engine without HTTP: answers are those of ``zinit generate``, alone and in mixed batches."""

from __future__ import annotations

import gc
import io
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from PIL import Image

import zinit
from tests.contract.test_generation import counted_projections, nothing_is_kept
from tests.serve.world import Asked, ask, folders, limits, models
from zinit.data.images import Encoded
from zinit.errors import CheckpointError, ConfigError
from zinit.models.decoding import Chooser
from zinit.serve.engine import Engine
from zinit.serve.requests import Refused, Sampling, Turn
from zinit.serve.served import Models
from zinit.ui.chat import ChatSession

TEXTS = ("Say red.", "What is the river, and where does the moon go when it is gone?", "Name it", "a")
ALL = ("anna", "bert", "talk", "tuned", "eyes")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = Engine(models(*ALL), limits()).start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, str], str]:
    """What ``zinit generate`` answers, for the adapters of runs and for the base."""
    found = {}
    for name in ("anna", "bert", "talk", "base"):
        session = ChatSession(folders()["anna" if name == "base" else name], temperature=0, max_new_tokens=24)
        session.base = name == "base"
        found |= {(name, text): session.answer(text, stream=False) for text in TEXTS}
    return found


def test_the_answers_tell_the_adapters_apart(expected: dict[tuple[str, str], str]) -> None:
    for text in TEXTS:
        assert len({expected[name, text] for name in ("anna", "bert", "talk", "base")}) == 4


def test_alone_an_answer_is_that_of_generate(engine: Engine, expected: dict[tuple[str, str], str]) -> None:
    for (name, text), answer in list(expected.items())[::3]:
        (piece,) = ask(engine, name, text).wait()
        assert piece.answer == answer


def test_in_a_mixed_batch_an_answer_is_that_of_generate(engine: Engine, expected: dict[tuple[str, str], str]) -> None:
    """More requests than rows, so that some join while others are in the middle."""
    asked = {key: ask(engine, *key) for key in expected}
    others = [ask(engine, "tuned", text) for text in TEXTS]
    assert {key: one.wait()[0].answer for key, one in asked.items()} == expected
    alone = [ask(engine, "tuned", text).wait()[0].tokens for text in TEXTS]
    assert [one.wait()[0].tokens for one in others] == alone


def test_a_tuned_adapter_is_that_of_the_library(engine: Engine) -> None:
    model: Any = engine._models.base
    (piece,) = ask(engine, "tuned", "Say red.", raw=True).wait()
    handle: Any = engine._models.get("tuned").handle
    with handle.alone():
        assert piece.tokens == by_library(engine, model, "Say red.")
    with handle.disabled():
        assert piece.tokens != by_library(engine, model, "Say red.")


def by_library(engine: Engine, model: Any, text: str) -> tuple[int, ...]:
    prompt = [0, *engine._models.tokenizer(text, add_special_tokens=False)["input_ids"]]
    ids = torch.tensor([prompt])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    return tuple(found[0, len(prompt) :].tolist())


def png(colour: tuple[int, int, int], side: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return file.getvalue()


def test_images_reach_the_adapter_that_sees(engine: Engine) -> None:
    """Rows with different images, and one without, at once."""
    served = engine._models.get("eyes")
    handle: Any = served.handle
    pictures = [[png((250, 0, 0))], [png((0, 0, 250)), png((9, 99, 9))], []]
    asked = [ask(engine, "eyes", "What is it?", images=images) for images in pictures]
    answers = [one.wait()[0].tokens for one in asked]
    prompt = served.format.prompt(talk("What is it?"))
    ids = torch.tensor([prompt])
    for images, tokens in zip(pictures[:2], answers, strict=False):
        shown = [Image.open(io.BytesIO(image)) for image in images]
        with handle.alone(), handle.given(image=[shown]):
            found = handle.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        assert tuple(found[0, len(prompt) :].tolist()) == tokens
    assert len(set(answers)) == 3


def test_images_are_decoded_when_they_are_seen_and_not_kept(engine: Engine) -> None:
    with Gate(engine):
        asked = ask(engine, "eyes", "What is it?", images=[png((250, 0, 0))], n=2)
        rows = list(engine._waiting)
        assert [isinstance(image, Encoded) for row in rows for image in row.images] == [True, True]
    asked.wait()
    assert [(row.images, row.context is None, row.group) for row in rows] == [((), False, "eyes")] * 2


def test_an_image_that_is_damaged_within_ends_its_request_alone(engine: Engine) -> None:
    (expected,) = ask(engine, "eyes", "What is it?", images=[png((250, 0, 0))]).wait()
    damaged = bytearray(png((250, 0, 0)))
    damaged[damaged.index(b"IDAT") + 6] ^= 255
    with Gate(engine):
        bad = ask(engine, "eyes", "What is it?", images=[bytes(damaged)], n=2)
        good = ask(engine, "eyes", "What is it?", images=[png((250, 0, 0))])
    assert bad.failure.status == 400
    assert "image 1 is damaged or truncated" in bad.failure.message
    assert good.wait()[0].answer == expected.answer


def talk(text: str) -> Any:
    from zinit.data.conversations import Conversation, Round

    return Conversation(rounds=(Round(question=text),))


def test_pieces_add_up_and_stop_texts_end_an_answer(engine: Engine, expected: dict[tuple[str, str], str]) -> None:
    key = ("anna", TEXTS[1])
    asked = ask(engine, *key)
    asked.wait()
    assert len(asked.events) > 3
    assert "".join(piece.text for piece in asked.events) == expected[key].strip()
    stop = next(c for c in expected[key][3:] if c.isascii() and c.isprintable() and c != " ")
    asked = ask(engine, *key, stop=["never this", stop])
    (last,) = asked.wait()
    assert last.answer == expected[key].partition(stop)[0].strip()
    assert last.reason == "stop"
    assert "".join(piece.text for piece in asked.events) == last.answer
    (short,) = ask(engine, *key, max_tokens=5).wait()
    assert (short.reason, len(short.tokens)) == ("length", 5)


def test_what_is_drawn_depends_on_the_seed_alone(engine: Engine) -> None:
    """Not on who else is in the batch; several answers to one request differ."""
    how = {"temperature": 1.0, "seed": 11, "n": 3}
    alone = [piece.tokens for piece in ask(engine, "bert", "Say red.", **how).wait()]
    assert len(set(alone)) == 3
    crowd = [ask(engine, name, text, temperature=0.7) for name in ("anna", "base") for text in TEXTS[:2]]
    together = ask(engine, "bert", "Say red.", **how)
    assert [piece.tokens for piece in together.wait()] == alone
    assert [piece.tokens for piece in ask(engine, "bert", "Say red.", **{**how, "seed": 12}).wait()] != alone
    for one in crowd:
        one.wait()


def test_log_probabilities_are_the_models(engine: Engine) -> None:
    asked = ask(engine, "base", "Say red.", raw=True, logprobs=2, max_tokens=4)
    (last,) = asked.wait()
    found = [each for piece in asked.events for each in piece.logprobs]
    assert len(found) == len(last.tokens) == 4
    model: Any = engine._models.base
    prompt = [0, *engine._models.tokenizer("Say red.", add_special_tokens=False)["input_ids"]]
    with engine._models.get("anna").handle.disabled(), torch.no_grad():  # pyright: ignore
        scores = model(torch.tensor([[*prompt, *last.tokens]])).logits[0].log_softmax(-1)
    for number, each in enumerate(found):
        row = scores[len(prompt) - 1 + number]
        assert each.logprob == pytest.approx(float(row[last.tokens[number]]), abs=1e-4)
        assert [value for _, value in each.top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)


# --- coming and going -------------------------------------------------------------------------------------------------


class Gate:
    """Holds the engine between two tokens, until it is opened."""

    def __init__(self, engine: Engine) -> None:
        self.holds, self.opened = threading.Event(), threading.Event()
        self.engine = engine

    def __enter__(self) -> Gate:
        def wait() -> None:
            self.holds.set()
            self.opened.wait(60)

        threading.Thread(target=lambda: self.engine._call(wait)).start()
        assert self.holds.wait(60)
        return self

    def __exit__(self, *_: Any) -> None:
        self.opened.set()


def idle(engine: Engine) -> bool:
    for _ in range(500):
        if not engine.gauges()["running"] and not engine.gauges()["waiting"]:
            return True
        threading.Event().wait(0.01)
    return False


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


def test_a_receiver_that_fails_ends_its_request_alone(engine: Engine, expected: dict[tuple[str, str], str]) -> None:
    def fails(event: Any) -> None:
        raise RuntimeError("nobody is here")

    ticket = engine.chat("anna", [Turn(role="user", text="b")], Sampling(max_tokens=300), fails)
    assert ask(engine, "bert", TEXTS[0]).wait()[0].answer == expected["bert", TEXTS[0]]
    assert idle(engine)
    assert ticket.cancelled


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


def test_prompts_are_projected_once_for_all_requests(expected: dict[tuple[str, str], str]) -> None:
    """Whatever batches an adapter is in, and until adapters come or go."""
    served = models("anna", "bert", "tuned")
    engine = Engine(served, limits()).start()
    try:
        with counted_projections(served.base) as counts:
            first: dict[str, int] = {}
            for _ in range(2):
                asked = {key: ask(engine, *key) for key in expected if key[0] in ("anna", "bert")}
                others = [ask(engine, "tuned", text) for text in TEXTS]
                for key, one in asked.items():
                    assert one.wait()[0].answer == expected[key]
                assert all(one.wait() for one in others)
                first = dict(counts)
            assert ask(engine, "bert", TEXTS[0]).wait()[0].answer == expected["bert", TEXTS[0]]
            assert counts == first
            assert 0 < max(first.values()) <= 3
            anna = weakref.ref(zinit.get_handle(served.base, "served0").parts["prefix"])
            engine.load("again", str(folders()["talk"]))
            engine.unload("anna")
            gc.collect()
            assert anna() is None, "what was taken away takes no memory"
            assert ask(engine, "again", TEXTS[0]).wait()[0].answer == expected["talk", TEXTS[0]]
            assert ask(engine, "bert", TEXTS[0]).wait()[0].answer == expected["bert", TEXTS[0]]
            assert counts != first
    finally:
        engine.stop()
    assert nothing_is_kept(served.base)


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


@pytest.mark.parametrize("temperature", [1e-40, 9e-5])
def test_a_temperature_near_zero_takes_the_likeliest_token(
    engine: Engine, expected: dict[tuple[str, str], str], temperature: float
) -> None:
    with Gate(engine):
        cold, other = ask(engine, "anna", TEXTS[0], temperature=temperature), ask(engine, "bert", TEXTS[0])
    assert cold.wait()[0].answer == expected["anna", TEXTS[0]]
    assert other.wait()[0].answer == expected["bert", TEXTS[0]]


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


def test_adapters_of_another_base_are_refused(tmp_path: Any) -> None:
    from tests.contract.cases import causal_lm

    zinit.attach(causal_lm("Llama"), zinit.PrefixConfig(length=2)).save(tmp_path / "other")
    made = models()
    with pytest.raises(CheckpointError, match="made for other weights of the same shape"):
        made.add("other", str(tmp_path / "other"))
    assert list(made.by_name) == ["base"]
    with pytest.raises(CheckpointError, match="does not say which model it was made for: --model"):
        Models(str(tmp_path / "other"))
