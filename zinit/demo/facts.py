"""The invented world's facts: its people and towns, statements of them and questions about them.

Pure standard library and a pure function of a seed. :mod:`zinit.demo.world` makes texts and instructions of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from random import Random

SEED = 0
NUM_PEOPLE = 140
NUM_TOWNS = 24
HELD_OUT_PEOPLE = 26
HELD_OUT_TOWNS = 4


@dataclass(frozen=True)
class Relation:
    """A relation of a kind of subject: its label in a register, statements of it, and questions about it.

    ``cloze`` is the statement that names the relation and ends in the object: cut before the object, only one
    continuation is right.

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
        """The entities in no training instruction (the pretraining texts contain them)."""
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


RELATIONS = (
    Relation(
        name="home",
        kind="person",
        label="Home",
        values=(),  # the invented towns
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
        values=(),  # the invented rivers
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
"""Of every kind of subject, in the order in which facts are drawn."""


@cache
def build(seed: int = SEED) -> World:
    """Invent the world: ``NUM_PEOPLE`` people and ``NUM_TOWNS`` towns, and one object for each of their relations."""
    rng = Random(f"world {seed}")
    taken: set[str] = set()
    people = _invent(rng, NUM_PEOPLE, "a o i en is ette ik una eth oy", taken)
    towns = _invent(rng, NUM_TOWNS, "ford stead vale wick haven mouth", taken)
    rivers = _invent(rng, NUM_TOWNS, "ess ave oun ax", taken)
    invented = {"home": towns[:-HELD_OUT_TOWNS], "river": rivers}
    relations = [replace(relation, values=invented.get(relation.name, relation.values)) for relation in RELATIONS]
    facts = {
        subject: tuple(
            Fact(subject, relation, rng.choice(relation.values)) for relation in relations if relation.kind == kind
        )
        for kind, subjects in (("person", people), ("town", towns))
        for subject in subjects
    }
    return World(people, towns, facts)
