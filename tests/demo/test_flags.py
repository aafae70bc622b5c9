"""The demo's flags: which town has which is told by pictures alone, and one relation of each town never is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from zinit.data.images import image_digest
from zinit.demo import world
from zinit.demo.flags import NAME, SEEN, UNSEEN, flags
from zinit.runs.settings import resolve
from zinit.runs.train import train_run
from zinit.tasks.conversation.config import ConversationConfig
from zinit.tasks.conversation.records import split_conversations
from zinit.tasks.inputs import DataInputs


def test_no_drawing_is_in_both_parts_and_no_question_gives_it_away() -> None:
    train, held_out = flags()
    assert Counter(asked.category for asked in held_out) == {NAME: 240, SEEN: 480, UNSEEN: 240}
    assert Counter(asked.category for asked in train) == {NAME: 1440, SEEN: 2880}
    drawn = [{image_digest(asked.image) for asked in part} for part in (train, held_out)]
    assert (len(drawn[0]), len(drawn[1])) == (1440, 240)
    assert not drawn[0] & drawn[1]
    assert not any(town in asked.text for asked in (*train, *held_out) for town in world.build().towns)


def test_answers_are_facts_of_the_town_and_one_relation_is_never_trained() -> None:
    here = world.build()
    train, held_out = flags()
    of_town = {image_digest(asked.image): asked.answer for asked in (*train, *held_out) if asked.category == NAME}
    assert Counter(of_town[image_digest(asked.image)] for asked in held_out if asked.category == NAME) == dict.fromkeys(
        here.towns, 10
    )
    facts = {town: {fact.object: fact.relation.name for fact in here.facts[town]} for town in here.towns}
    trained: dict[str, set[str]] = {town: set() for town in here.towns}
    for asked in train:
        town = of_town[image_digest(asked.image)]
        if asked.category != NAME:
            trained[town].add(facts[town][asked.answer])
    assert all(len(relations) == 2 for relations in trained.values())
    for asked in held_out:
        town = of_town[image_digest(asked.image)]
        if asked.category != NAME:
            assert (facts[town][asked.answer] in trained[town]) == (asked.category == SEEN)


def test_it_is_a_function_of_its_seed() -> None:
    first, again, other = flags()[1], flags()[1], flags(1)[1]
    assert [(a.text, a.answer, a.image.tobytes()) for a in first] == [
        (a.text, a.answer, a.image.tobytes()) for a in again
    ]
    assert [a.answer for a in first] != [a.answer for a in other], "which flag is whose, and in which order it is asked"


@pytest.mark.parametrize("method", ["v1-multimodal", "v2", "v2-late", "imagebind-llm"])
def test_the_demo_of_a_method_with_images(method: str) -> None:
    config, preset = resolve(backbone="llama", method=method)
    assert preset == ("conversation/flags-bind" if method == "imagebind-llm" else "conversation/flags")
    assert (config.method, config.task, config.options.demo) == (method, "conversation", "flags")
    assert config.context is not None
    assert config.train.learning_rate == 2e-2  # the preset's, for all of the family


def test_it_runs_and_its_report_shows_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = [
        "steps=2",
        "warmup_steps=0",
        "evaluation_limit=3",
        "task.demo=flag-names",
        "evaluate_every=0",
        "save_every=0",
    ]
    results = train_run(resolve(backbone="llama", method="v1-multimodal", options=options)[0], tmp_path / "run")
    assert list(results["metrics"]) == ["base", "adapted", "shuffled"]
    assert results["counts"]["train"] == 1440
    report = (tmp_path / "run" / "report.html").read_text()
    assert report.count("data:image/jpeg;base64,") >= 3
    assert "shuffled" in report


@pytest.mark.parametrize(("demo", "talks", "images"), [("flags", 4320, 144), ("instructions", 630, 0)])
def test_a_validation_part_is_of_the_training_part_and_shares_no_image_with_it(
    demo: str, talks: int, images: int
) -> None:
    config = ConversationConfig(demo=demo, validation=True)  # pyright: ignore[reportArgumentType]
    kept, chosen, _ = split_conversations(DataInputs(), config)
    assert len(kept) + len(chosen) == talks
    drawn = [{image.tobytes() for talk in part for image in talk.images} for part in (kept, chosen)]  # pyright: ignore
    assert not drawn[0] & drawn[1]
    assert len(drawn[1]) == images
    assert len(chosen) == talks // 10
