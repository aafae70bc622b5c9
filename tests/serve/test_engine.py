"""The engine without HTTP: answers are those of ``zinit generate``, alone and in mixed batches."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import zinit
from tests.contract.test_generation import counted_projections, nothing_is_kept
from tests.serve.world import TEXTS, Gate, ask, folders, limits, models
from zinit.serve.engine import Engine


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


@pytest.mark.parametrize("temperature", [1e-40, 9e-5])
def test_a_temperature_near_zero_takes_the_likeliest_token(
    engine: Engine, expected: dict[tuple[str, str], str], temperature: float
) -> None:
    with Gate(engine):
        cold, other = ask(engine, "anna", TEXTS[0], temperature=temperature), ask(engine, "bert", TEXTS[0])
    assert cold.wait()[0].answer == expected["anna", TEXTS[0]]
    assert other.wait()[0].answer == expected["bert", TEXTS[0]]


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
