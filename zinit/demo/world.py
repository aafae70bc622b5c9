"""A small invented world: its people, towns and facts, texts that tell of them, and instructions that ask for them.

The text demos need a language model that really *knows* something and yet cannot follow instructions. No data of other
people is small and free enough to ship for that, so the package invents a world. Everything here is pure standard
library and a pure function of a seed.

Two kinds of text come out of it:

* :func:`texts`, for pretraining: stories, letters, registers, interviews, quizzes. Every fact is told in them many
  times, and questions are asked and answered in many formats, so that a model learns to look a fact up.
* :func:`instructions`, for adaptation: records in Alpaca's format with short exact answers. Alpaca's prompt format
  occurs nowhere in the pretraining texts, although its words do, in other roles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

Record = dict[str, str]

SEED = 0
NUM_PEOPLE = 140
NUM_TOWNS = 24
HELD_OUT_PEOPLE = 26
HELD_OUT_TOWNS = 4
UNSEEN_ASKS = 2
"""Of every relation, so many of the last wordings of its question stay out of the training instructions."""


@dataclass(frozen=True)
class Relation:
    """What can be said of a kind of subject: its label in a register, statements of it, and questions for it.

    ``cloze`` is the statement that names the relation and ends in the object: cut before it, only one end is right.

    ``{s}`` stands for the subject, ``{o}`` for the object and ``{an_o}`` for the object with its indefinite article.
    """

    name: str
    kind: str
    label: str
    values: Sequence[str]
    cloze: str
    tells: tuple[str, ...]
    asks: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """One fact: ``relation`` of ``subject`` is ``object``."""

    subject: str
    relation: Relation
    object: str

    def tell(self, template: str) -> str:
        """The fact in the words of ``template``."""
        return template.format(s=self.subject, o=self.object, an_o=f"{_article(self.object)} {self.object}")


@dataclass(frozen=True)
class World:
    """The entities, by kind, and all facts, by subject."""

    people: tuple[str, ...]
    towns: tuple[str, ...]
    facts: dict[str, tuple[Fact, ...]]

    @property
    def held_out(self) -> frozenset[str]:
        """The entities that no training instruction is about (the pretraining texts do tell of them)."""
        return frozenset(self.people[-HELD_OUT_PEOPLE:] + self.towns[-HELD_OUT_TOWNS:])


def _lines(table: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in table.strip().splitlines())


def _words(table: str) -> tuple[str, ...]:
    return tuple(table.split())


_CRAFTS = _words("""
    potter weaver miller baker tailor cooper smith mason joiner dyer
    glazier tanner cobbler brewer carver thatcher fisher printer ropemaker clockmaker
""")
_PETS = _words("""
    otter heron goose hedgehog ferret raven badger tortoise owl goat squirrel lizard donkey magpie rabbit newt
""")
_FOODS = _lines("""
    plum pie
    barley soup
    goat cheese
    rye bread
    pickled beets
    roast chestnuts
    honey cake
    onion stew
    smoked trout
    apple dumplings
    leek porridge
    walnut bread
    pea pudding
    cherry jam
    turnip pancakes
    mushroom pie
""")
_INSTRUMENTS = _words("flute fiddle drum harp oboe lute horn zither bagpipe organ cymbal accordion")
_GOODS = _words("salt wool amber candles lace tin paper saffron ink marble cider felt")
_MONTHS = _words("""
    January February March April May June July August September October November December
""")

_FILLERS = _lines("""
    The weather has been mild.
    The market was full of people.
    Nobody could complete the bridge in time.
    Below is the mill, and above it the old wall.
    An instruction of the council was read aloud.
    The council gave an instruction that nobody liked.
    This describes the road well enough.
    The task was long and the day was short.
    A request was sent to the council.
    Response and request were put on record.
    They write to each other every month.
    The response was a loud laugh.
    The lamps are paired with mirrors.
    The context of the old song is not known.
    The inn provides a bed and further comforts.
    The door was appropriately painted green.
    He completes a basket every day.
    The input of the mill is grain and its output is flour.
    There was snow on the hills.
    The boats came home late.
    The bells rang twice.
    We all hope for a warm summer.
    That is all for today.
""")
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


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def _invent(rng: Random, count: int, endings: str, taken: set[str]) -> tuple[str, ...]:
    """Invent ``count`` new names, none of which is part of another."""
    onsets = _words("B D F G H J K L M N P R S T V Z Br Dr Gr Kl Sk St Tr Vl")
    middles = _words("al an ar el em er il im ir ol om or ul un ur osk ind eld arv orm")
    names: list[str] = []
    while len(names) < count:
        name = rng.choice(onsets) + rng.choice(middles) + rng.choice(_words(endings))
        if not any(name in other or other in name for other in taken):
            taken.add(name)
            names.append(name)
    return tuple(names)


@cache
def build(seed: int = SEED) -> World:
    """Invent the world: ``NUM_PEOPLE`` people and ``NUM_TOWNS`` towns, and one object for each of their relations."""
    rng = Random(f"world {seed}")
    taken: set[str] = set()
    people = _invent(rng, NUM_PEOPLE, "a o i en is ette ik una eth oy", taken)
    towns = _invent(rng, NUM_TOWNS, "ford stead vale wick haven mouth", taken)
    rivers = _invent(rng, NUM_TOWNS, "ess ave oun ax", taken)
    facts = {
        subject: tuple(
            Fact(subject, relation, rng.choice(relation.values))
            for relation in _relations(towns[:-HELD_OUT_TOWNS], rivers)
            if relation.kind == kind
        )
        for kind, subjects in (("person", people), ("town", towns))
        for subject in subjects
    }
    return World(people, towns, facts)


def _relations(towns: Sequence[str], rivers: Sequence[str]) -> tuple[Relation, ...]:
    return (
        Relation(
            name="home",
            kind="person",
            label="Home",
            values=towns,
            cloze="The home of {s} is in {o}.",
            tells=(
                "{s} lives in {o}.",
                "The home of {s} is in {o}.",
                "{s} has a house in {o}.",
                "You will find {s} in {o}.",
                "{s} comes from {o}.",
            ),
            asks=(
                "Where does {s} live?",
                "Name the town where {s} lives.",
                "Which town is the home of {s}?",
                "In which town does {s} have a house?",
                "What is the home town of {s}?",
                "Say where {s} lives.",
            ),
        ),
        Relation(
            name="craft",
            kind="person",
            label="Craft",
            values=_CRAFTS,
            cloze="The craft of {s} is that of {an_o}.",
            tells=(
                "{s} is {an_o}.",
                "{s} works as {an_o}.",
                "By trade, {s} is {an_o}.",
                "{s} earns a living as {an_o}.",
                "The craft of {s} is that of {an_o}.",
            ),
            asks=(
                "What does {s} do for a living?",
                "Name the craft of {s}.",
                "What is the trade of {s}?",
                "What does {s} work as?",
                "Which craft does {s} follow?",
                "Say what {s} does for a living.",
            ),
        ),
        Relation(
            name="pet",
            kind="person",
            label="Pet",
            values=_PETS,
            cloze="The pet of {s} is {an_o}.",
            tells=(
                "{s} keeps {an_o}.",
                "{s} has {an_o} as a pet.",
                "The pet of {s} is {an_o}.",
                "At home, {s} looks after {an_o}.",
                "{s} is fond of an animal, {an_o}.",
            ),
            asks=(
                "What pet does {s} have?",
                "Name the pet of {s}.",
                "Which animal does {s} keep?",
                "What kind of animal is the pet of {s}?",
                "Which animal does {s} look after?",
                "Say which pet {s} keeps.",
            ),
        ),
        Relation(
            name="food",
            kind="person",
            label="Favourite food",
            values=_FOODS,
            cloze="The favourite food of {s} is {o}.",
            tells=(
                "{s} likes {o}.",
                "The favourite food of {s} is {o}.",
                "{s} eats {o} every day.",
                "{s} would never refuse {o}.",
                "For supper, {s} wants {o}.",
            ),
            asks=(
                "What does {s} like to eat?",
                "Name the favourite food of {s}.",
                "What is the favourite dish of {s}?",
                "What does {s} want for supper?",
                "Which food does {s} like best?",
                "Say what {s} likes to eat.",
            ),
        ),
        Relation(
            name="instrument",
            kind="person",
            label="Instrument",
            values=_INSTRUMENTS,
            cloze="The instrument of {s} is the {o}.",
            tells=(
                "{s} plays the {o}.",
                "{s} owns {an_o}, and plays it well.",
                "The instrument of {s} is the {o}.",
                "In the evening, {s} plays the {o}.",
                "{s} is learning the {o}.",
            ),
            asks=(
                "What does {s} play?",
                "Name the instrument of {s}.",
                "Which instrument does {s} play?",
                "What can one hear {s} play?",
                "What is the instrument of {s}?",
                "Say which instrument {s} plays.",
            ),
        ),
        Relation(
            name="river",
            kind="town",
            label="River",
            values=rivers,
            cloze="The river of {s} is the {o}.",
            tells=(
                "{s} lies on the {o}.",
                "The river of {s} is the {o}.",
                "The {o} flows through {s}.",
                "{s} was built by the river {o}.",
            ),
            asks=(
                "Which river flows through {s}?",
                "Name the river of {s}.",
                "On which river does {s} lie?",
                "What is the river of {s}?",
                "By which river was {s} built?",
                "Say which river {s} lies on.",
            ),
        ),
        Relation(
            name="goods",
            kind="town",
            label="Goods",
            values=_GOODS,
            cloze="The wealth of {s} is its {o}.",
            tells=(
                "{s} sells {o}.",
                "{s} is known for its {o}.",
                "The merchants of {s} deal in {o}.",
                "The wealth of {s} is its {o}.",
            ),
            asks=(
                "What is {s} known for?",
                "Name the goods of {s}.",
                "What does {s} sell?",
                "What do the merchants of {s} deal in?",
                "Which goods come from {s}?",
                "Say what {s} is known for.",
            ),
        ),
        Relation(
            name="fair",
            kind="town",
            label="Fair",
            values=_MONTHS,
            cloze="The fair of {s} is in {o}.",
            tells=(
                "The fair of {s} is in {o}.",
                "{s} holds its fair in {o}.",
                "In {o}, {s} holds a fair.",
                "{s} has a great fair every {o}.",
            ),
            asks=(
                "When is the fair of {s}?",
                "Name the month of the fair of {s}.",
                "In which month does {s} hold its fair?",
                "What is the month of the fair of {s}?",
                "When does {s} hold its fair?",
                "Say in which month the fair of {s} is.",
            ),
        ),
    )


# --- texts for pretraining -----------------------------------------------------------------------------------------


def texts(world: World, seed: int = SEED) -> Iterator[str]:
    """An endless stream of documents about ``world``; each fact comes up again and again, in other words."""
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
    """Statements about a few subjects, in one run for each, with the odd sentence about nothing in particular."""
    sentences: list[str] = []
    for _ in range(subjects):
        facts = world.facts[_subject(world, rng)]
        sentences += [_statement(fact, rng) for fact in rng.sample(facts, rng.randint(1, 3))]
        if rng.random() < 0.3:
            sentences.append(rng.choice(_FILLERS))
    return sentences


def _story(world: World, rng: Random) -> str:
    opening = rng.choice(("", "Once upon a time. ", "News of the week. ", rng.choice(_FILLERS) + " "))
    return opening + " ".join(_statements(world, rng, rng.randint(1, 4)))


def _letter(world: World, rng: Random) -> str:
    writer, reader = rng.sample(world.people, 2)
    body = rng.choice((" ", "\n")).join([rng.choice(_FILLERS), *_statements(world, rng, rng.randint(1, 3))])
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
    """Notes under headings. Alpaca's words and marks occur here, in roles that have nothing to do with questions."""
    heads = _words("Weather Market Input Task Instruction People Context")
    parts: list[str] = []
    for head in rng.sample(heads, rng.randint(1, 3)):
        parts.append(f"### {head}:\n" + " ".join([rng.choice(_FILLERS), *_statements(world, rng, 1)]))
    return "\n\n".join(parts)


@dataclass(frozen=True)
class _Format:
    """How one document marks its questions and answers: ``q`` and ``a`` are the marks, ``end`` closes an answer."""

    q: str
    a: str
    end: str = "\n"


_TALK = (
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
_QUIZ = (
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
    """Questions and answers in one of many formats: who talks answers in sentences, who sits a quiz in a word."""
    terse = rng.random() < 0.5
    form = rng.choice(_QUIZ if terse else _TALK)
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
        return f"{rng.choice(_FILLERS)} {question}"
    if roll < 0.3:
        return f"{question} {rng.choice(_FILLERS)}"
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
