"""Reading comprehension in SQuAD v2.0's format: paragraphs about the invented world's entities, and questions on them.

Every paragraph draws its facts anew, in contradiction to all others: an answer has to be read, it cannot be remembered.
Some questions have no answer: the paragraph states the asked relation of somebody else only.
Everything is pure standard library and a pure function of a seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from zinit.demo import world
from zinit.demo.world import Fact, World

NUM_TRAIN = 1600
NUM_DEV = 300
PER_PARAGRAPH = 5
_PER_ARTICLE = 20


def passage(here: World, rng: Random, subjects: Sequence[str]) -> tuple[list[Fact], list[Fact]]:
    """Draws facts about ``subjects``, which are of one kind: ``(told, untold)``.

    No two subjects share an object. A relation that is untold of one subject is told, with another object, of another.
    """
    facts: list[Fact] = []
    for relation in (fact.relation for fact in here.facts[subjects[0]]):
        objects = rng.sample(relation.values, len(subjects))
        facts += [Fact(subject, relation, object) for subject, object in zip(subjects, objects, strict=True)]
    rng.shuffle(facts)
    count = rng.randint(4, 6)
    told = facts[:count]
    relations = {fact.relation.name for fact in told}
    return told, [fact for fact in facts[count:] if fact.relation.name in relations]


def tell(told: Sequence[Fact], rng: Random) -> tuple[str, list[int]]:
    """One sentence per fact, with an occasional unrelated one: the text, and where each object starts in it."""
    text = ""
    starts: list[int] = []
    for fact in told:
        template = rng.choice(fact.relation.tells)
        before = fact.tell(template[: max(template.find("{o}"), template.find("{an_o}"))])
        sentence = fact.tell(template)
        starts.append(len(text) + sentence.index(fact.object, len(before)))
        text += sentence + " "
        if rng.random() < 0.1:
            text += rng.choice(world.FILLERS) + " "
    return text.rstrip(), starts


def ask(fact: Fact, rng: Random) -> str:
    """A question that ``fact`` answers."""
    return rng.choice(fact.relation.asks).format(s=fact.subject)


def choose_subjects(people: Sequence[str], towns: Sequence[str], rng: Random) -> list[str]:
    """Two or three people, or three towns: the subjects of one paragraph."""
    return rng.sample(towns, 3) if rng.random() < 0.1 else rng.sample(people, rng.randint(2, 3))


def _paragraph(here: World, rng: Random, subjects: Sequence[str], name: str) -> dict[str, Any]:
    told, untold = passage(here, rng, subjects)
    context, starts = tell(told, rng)
    answers = {(fact.subject, fact.relation.name): start for fact, start in zip(told, starts, strict=True)}
    unanswered = min(len(untold), rng.choice((1, 2, 2)))
    asked = rng.sample(told, min(len(told), PER_PARAGRAPH - unanswered)) + rng.sample(untold, unanswered)
    rng.shuffle(asked)
    qas: list[dict[str, Any]] = []
    for number, fact in enumerate(asked):
        start = answers.get((fact.subject, fact.relation.name))
        found = [] if start is None else [{"text": fact.object, "answer_start": start}]
        qas.append(
            {
                "id": f"{name}-{number}",
                "question": ask(fact, rng),
                "answers": found,
                "is_impossible": start is None,
            }
        )
    return {"context": context, "qas": qas}


def _document(here: World, rng: Random, people: Sequence[str], towns: Sequence[str], part: str, count: int) -> Any:
    """A SQuAD v2.0 document of ``count`` questions."""
    articles: list[dict[str, Any]] = []
    total = number = 0
    while total < count:
        if number % _PER_ARTICLE == 0:
            articles.append({"title": f"The {part} chronicle, chapter {len(articles) + 1}", "paragraphs": []})
        paragraph = _paragraph(here, rng, choose_subjects(people, towns, rng), f"{part}-{number}")
        paragraph["qas"] = paragraph["qas"][: count - total]
        articles[-1]["paragraphs"].append(paragraph)
        total += len(paragraph["qas"])
        number += 1
    return {"version": "v2.0", "data": articles}


def documents(here: World, seed: int = world.SEED) -> tuple[dict[str, Any], dict[str, Any]]:
    """SQuAD v2.0 documents ``(train, dev)``. They share no subject, hence no paragraph; dev is about ``held_out``."""
    rng = Random(f"questions {seed}")

    def entities(held_out: bool) -> tuple[list[str], list[str]]:
        people, towns = ([x for x in xs if (x in here.held_out) == held_out] for xs in (here.people, here.towns))
        return people, towns

    return (
        _document(here, rng, *entities(False), "train", NUM_TRAIN),
        _document(here, rng, *entities(True), "dev", NUM_DEV),
    )
