"""Wrong input to readers of texts with images."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz import mutate
from tests.tasks import caption, science_qa
from zinit.data.conversations import read_conversations
from zinit.tasks.caption.records import CaptionReading
from zinit.tasks.science_qa.problems import ProblemFolder


def captions(rng: Random, folder: Path) -> Callable[[], Any]:
    """Captions in each of their forms."""
    caption.draw(folder, 2)
    caption.draw(folder / "pictures", 2)
    kind = rng.randrange(4)
    if kind == 0:
        source, content = "a.csv", mutate.content(rng, caption.table(2).encode())
    elif kind == 1:
        source, content = "a.jsonl", mutate.content(rng, caption.lines(2).encode())
    else:
        valid = caption.karpathy(2) if kind == 2 else caption.coco(2)
        source, content = "a.json", mutate.json_content(rng, valid)
    (folder / source).write_bytes(content)
    reading = CaptionReading(on_bad=rng.choice(("error", "skip")))

    def call() -> None:
        found = reading.read(str(folder / source))
        assert reading.counts["images_read"] == len(found) + reading.counts["images_skipped"]
        kept = sum(len(image.captions) for image in found)
        assert reading.counts["captions_read"] == kept + reading.counts["captions_skipped"]

    return call


def talks(rng: Random, folder: Path) -> Callable[[], Any]:
    """Conversations in each of their forms, with images."""
    image, other = caption.draw(folder, 2)
    asked = {"role": "user", "content": "<image>Who?"}
    parts = [{"type": "image", "image": other}, {"type": "text", "text": "And this?"}]
    valid = [
        {"messages": [asked, {"role": "assistant", "content": "Ada."}], "images": [image], "system": "Be brief."},
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Bo."}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "category": "x"},
        {"instruction": "Say red.", "input": "", "output": "red", "history": [["a", "b"]]},
    ]
    path = folder / rng.choice(("a.json", "a.jsonl"))
    lines = "\n".join(map(json.dumps, valid)).encode()
    path.write_bytes(mutate.json_content(rng, valid) if path.suffix == ".json" else mutate.content(rng, lines))
    counts: Counter[str] = Counter()

    def call() -> None:
        found = read_conversations(str(path), counts=counts)
        assert counts["read"] == len(found) + sum(n for name, n in counts.items() if name.startswith("skipped"))
        assert all(each.answer.strip() for talk in found for each in talk.rounds)

    return call


def problems(rng: Random, folder: Path) -> Callable[[], Any]:
    """ScienceQA's folder."""
    valid, splits = science_qa.document(4)
    science_qa.save(folder, valid, splits)
    name, content = rng.choice((("problems.json", valid), ("pid_splits.json", splits)))
    changed = mutate.json_content(rng, content)
    (folder / name).write_bytes(changed)
    on_bad = rng.choice(("error", "skip"))

    def call() -> None:
        reading = ProblemFolder.of(str(folder), on_bad=on_bad, images=rng.random() < 0.5)
        tested = reading.take("test")
        training = reading.take("train", [problem.id for problem in tested])
        counts = reading.report("train", "test")
        skipped = counts["skipped_unusable"] + counts["skipped_not_in_a_split"] + counts["not_used"]
        assert counts["read"] == len(tested) + len(training) + skipped
        json.dumps([counts, reading.reasons])

    return call
