"""A small invented world: its people, towns and facts, texts that tell of them, and instructions that ask for them.

The text demos need a language model that really *knows* something and yet cannot follow instructions. No existing data
is small and free enough to ship for that, so the package invents a world. Everything here is pure standard
library and a pure function of a seed.

It yields two kinds of text:

* :func:`texts`, for pretraining: stories, letters, registers, interviews, quizzes. They state every
  fact many times, and ask and answer questions in many formats, so that a model learns to look facts up.
* :func:`instructions`, for adaptation: records in Alpaca's format with short exact answers. Alpaca's prompt format
  occurs nowhere in the pretraining texts, although its words do, in other roles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from zinit.demo.facts import SEED, Fact, World, build

__all__ = ["SEED", "Fact", "Record", "World", "build", "cloze", "instructions", "texts"]

Record = dict[str, str]

UNSEEN_ASKS = 2
"""The last wordings of a relation's question that stay out of the training instructions."""

FILLERS = (
    "The weather has been mild.",
    "The market was full of people.",
    "Nobody could complete the bridge in time.",
    "Below is the mill, and above it the old wall.",
    "An instruction of the council was read aloud.",
    "The council gave an instruction that nobody liked.",
    "This describes the road well enough.",
    "The task was long and the day was short.",
    "A request was sent to the council.",
    "Response and request were put on record.",
    "They write to each other every month.",
    "The response was a loud laugh.",
    "The lamps are paired with mirrors.",
    "The context of the old song is not known.",
    "The inn provides a bed and further comforts.",
    "The door was appropriately painted green.",
    "He completes a basket every day.",
    "The input of the mill is grain and its output is flour.",
    "There was snow on the hills.",
    "The boats came home late.",
    "The bells rang twice.",
    "We all hope for a warm summer.",
    "That is all for today.",
)
_CHATTY = (
    "Ah, that is easy. {}",
    "Let me think. {}",
    "As far as I know: {}",
    "Everybody knows it. {}",
    "If I am not mistaken: {}",
    "Well. {}",
    "I am glad you ask. {}",
    "They say so at least: {}",
)
_UNNAMED = {
    "person": ("this person", "the person below", "the following person", "the person named here"),
    "town": ("this town", "the town below", "the following town", "the town named here"),
}


# --- texts for pretraining -----------------------------------------------------------------------------------------


def texts(world: World, seed: int = SEED) -> Iterator[str]:
    """An endless stream of documents about ``world``; each fact recurs in many wordings."""
    rng = Random(f"texts {seed}")
    makers = (_story, _letter, _register, _exchanges, _notes)
    while True:
        yield rng.choices(makers, weights=(3, 1, 3, 8, 1))[0](world, rng)


def _subject(world: World, rng: Random) -> str:
    return rng.choice(world.towns if rng.random() < 0.1 else world.people)


def _fact(world: World, rng: Random) -> Fact:
    return rng.choice(world.facts[_subject(world, rng)])


def _statement(fact: Fact, rng: Random) -> str:
    return fact.tell(rng.choice(fact.relation.tells))


def _statements(world: World, rng: Random, subjects: int) -> list[str]:
    """Statements about a few subjects, in one run for each, with an occasional unrelated sentence."""
    sentences: list[str] = []
    for _ in range(subjects):
        facts = world.facts[_subject(world, rng)]
        sentences += [_statement(fact, rng) for fact in rng.sample(facts, rng.randint(1, 3))]
        if rng.random() < 0.3:
            sentences.append(rng.choice(FILLERS))
    return sentences


def _story(world: World, rng: Random) -> str:
    opening = rng.choice(("", "Once upon a time. ", "News of the week. ", rng.choice(FILLERS) + " "))
    return opening + " ".join(_statements(world, rng, rng.randint(1, 4)))


def _letter(world: World, rng: Random) -> str:
    writer, reader = rng.sample(world.people, 2)
    body = rng.choice((" ", "\n")).join([rng.choice(FILLERS), *_statements(world, rng, rng.randint(1, 3))])
    return f"Dear {reader},\n{body}\n{rng.choice(('Yours', 'With kind regards', 'Your old friend'))},\n{writer}"


def _register(world: World, rng: Random) -> str:
    """Entries of a register: a heading, then label and value; the values stand alone, as in a short answer."""
    colon, end = rng.choice((": ", ":", " = ", "=", ":\n")), rng.choice(("\n", "; ", "\n- "))
    entries: list[str] = []
    for _ in range(rng.randint(1, 3)):
        subject = _subject(world, rng)
        facts = world.facts[subject]
        lines = [f"{fact.relation.label}{colon}{fact.object}" for fact in rng.sample(facts, rng.randint(1, len(facts)))]
        entries.append(end.join([subject, *lines]))
    return "\n\n".join(entries)


def _notes(world: World, rng: Random) -> str:
    """Notes under headings. Alpaca's words and marks occur here in roles that are unrelated to questions."""
    heads = ("Weather", "Market", "Input", "Task", "Instruction", "People", "Context")
    parts: list[str] = []
    for head in rng.sample(heads, rng.randint(1, 3)):
        parts.append(f"### {head}:\n" + " ".join([rng.choice(FILLERS), *_statements(world, rng, 1)]))
    return "\n\n".join(parts)


@dataclass(frozen=True)
class _Format:
    """How one document marks its questions and answers: ``q`` and ``a`` are the marks, ``end`` closes an answer."""

    q: str
    a: str
    end: str = "\n"


TALK = (
    _Format("Q: ", "\nA: "),
    _Format("Teacher: ", "\nPupil: "),
    _Format("- ", "\n- "),
    _Format('"', '"\n"', '"\n'),
    _Format("Guest: ", "\nHost: "),
    _Format("They asked: ", "\nThe reply was: "),
    _Format("Question:\n", "\n\nAnswer:\n", "\n\n"),
    _Format("", "\n\n", "\n\n"),
    _Format("> ", "\n"),
    _Format("Dear friend,\n", "\nYours truly\n\nDear friend,\n", "\nYours truly\n\n"),
    _Format("", "\n"),
    _Format("A question was asked at the inn.\n", "\nThe answer was given at once:"),
)
QUIZ = (
    _Format("", " => "),
    _Format("", "|"),
    _Format("Card: ", "\nBack:"),
    _Format("[", "] "),
    _Format("* ", "\n* "),
    _Format("", "\t"),
    _Format("Quiz\n", "\nIn a word:", "\n\n"),
    _Format("(", ")\n"),
    _Format("Riddle: ", "\nSolution:"),
    _Format("1. ", "\n2. "),
    _Format("# ", "\n"),
    _Format("Short answers only.\n", "\n", "\n\n"),
)


def _exchanges(world: World, rng: Random) -> str:
    """Questions and answers in one of many formats: talk answers in sentences, a quiz in a word."""
    terse = rng.random() < 0.5
    form = rng.choice(QUIZ if terse else TALK)
    answer = _terse if terse else rng.choice((_statement, _chatty))
    facts = [_fact(world, rng) for _ in range(rng.randint(1, 5))]
    return "".join(form.q + _question(fact, rng) + form.a + answer(fact, rng) + form.end for fact in facts).rstrip()


def _terse(fact: Fact, rng: Random) -> str:
    return fact.object


def _chatty(fact: Fact, rng: Random) -> str:
    return rng.choice(_CHATTY).format(_statement(fact, rng))


def _question(fact: Fact, rng: Random) -> str:
    """A question for ``fact``, in one sentence or with its subject named apart."""
    ask = rng.choice(fact.relation.asks)
    if rng.random() < 0.6:
        question = ask.format(s=fact.subject)
    else:
        unnamed = ask.format(s=rng.choice(_UNNAMED[fact.relation.kind]))
        apart = rng.choice(
            (
                "{q}\n{s}",
                "{q} {s}",
                "{q}\nName: {s}",
                "{q} ({s})",
                "{s}. {q}",
                "{q}\n\n{s}",
                "About {s}: {q}",
                "{q}\nIt is about {s}.",
            )
        )
        question = apart.format(q=unnamed, s=fact.subject)
    roll = rng.random()
    if roll < 0.15:
        return f"{rng.choice(FILLERS)} {question}"
    if roll < 0.3:
        return f"{question} {rng.choice(FILLERS)}"
    return question


def cloze(world: World, *, held_out: bool) -> list[tuple[str, str]]:
    """Plain statements of all facts about the (not) held-out entities, cut before the object: ``(beginning, end)``."""
    cuts: list[tuple[str, str]] = []
    for subject, facts in world.facts.items():
        if (subject in world.held_out) == held_out:
            for fact in facts:
                template = fact.relation.cloze
                beginning = fact.tell(template[: template.rindex(" {")])
                cuts.append((beginning, fact.tell(template)[len(beginning) : -1]))
    return cuts


# --- instructions for adaptation -----------------------------------------------------------------------------------


def instructions(world: World, seed: int = SEED) -> tuple[list[Record], list[Record]]:
    """Alpaca-format records ``(train, held_out)`` with short exact answers.

    The parts share no entity, hence no fact, and no instruction: where the subject is named in the input, so that the
    instruction itself names nobody, the held-out part asks in wordings that the training part never uses.
    """
    rng = Random(f"instructions {seed}")
    train: list[Record] = []
    held_out: list[Record] = []
    for subject, facts in world.facts.items():
        unseen = subject in world.held_out
        part = held_out if unseen else train
        for fact in facts:
            asks = fact.relation.asks
            if rng.random() < 0.6:
                ask = rng.choice(asks if unseen else asks[:-UNSEEN_ASKS])
                part.append({"instruction": ask.format(s=subject), "input": "", "output": fact.object})
            else:
                ask = rng.choice(asks[-UNSEEN_ASKS:] if unseen else asks[:-UNSEEN_ASKS])
                unnamed = rng.choice(_UNNAMED[fact.relation.kind])
                part.append({"instruction": ask.format(s=unnamed), "input": subject, "output": fact.object})
    rng.shuffle(train)
    rng.shuffle(held_out)
    return train, held_out
