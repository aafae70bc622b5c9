"""Images in the engine: they reach the adapter that sees, are decoded late, and a damaged one harms nobody else."""

from __future__ import annotations

import io
from typing import Any

import torch
from PIL import Image

from tests.serve.world import Gate, ask, png, talk
from zinit.data.images import Encoded
from zinit.serve.engine import Engine


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
