"""How answers to ScienceQA are read and scored, as by its authors' script."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from zinit.tasks.science_qa.config import Readout
from zinit.tasks.science_qa.problems import LETTERS, Problem

_ANSWER = re.compile(r"The answer is ([A-Z]).")  # any character ends it, as in the original
SUBJECTS = {"nat": "natural science", "soc": "social science", "lan": "language science"}
HIGHER_GRADES = 7  # grades from here to 12 are one category


def read_answer(output: str, options: int) -> int | None:
    """The place of the option that an output names; None if it names none, or says so more than once.

    Args:
        output: what the model wrote.
        options: how many the problem has.
    """
    found = _ANSWER.findall(output)
    place = LETTERS.find(found[0]) if len(found) == 1 else -1
    return place if 0 <= place < options else None


def categories(problem: Problem) -> tuple[str, ...]:
    """The columns of ScienceQA's table that a problem counts in, beside the average over all.

    A problem with a hint and an image counts in both columns.
    """
    has_hint = bool(problem.hint.strip())
    found = [name for name, subject in SUBJECTS.items() if problem.subject == subject]
    found += ["txt"] * has_hint + ["img"] * problem.has_image + ["no"] * (not has_hint and not problem.has_image)
    return (*found, "g7_12" if problem.grade >= HIGHER_GRADES else "g1_6")


def score_answers(
    problems: Sequence[Problem], outputs: Sequence[str], *, readout: Readout = "strict", seed: int = 0
) -> tuple[dict[str, float], dict[str, int]]:
    """Accuracy over all, and in each category that occurs: natural, social and language science; with a text hint, with
    an image, with neither; grades 1 to 6 and 7 to 12.

    Args:
        problems: that were asked.
        outputs: the model's answers, in words.
        readout: what an output counts as of which no answer can be read: "strict": wrong; "original": a random choice
            of the options, as in the authors' script.
        seed: of these choices, with the problem's id.

    Returns:
        Accuracies, 0 to 1; and counts: "unread" outputs, and the problems of each category.
    """
    right: dict[str, list[bool]] = {name: [] for name in ("", *SUBJECTS, "txt", "img", "no", "g1_6", "g7_12")}
    unread = 0
    for problem, output in zip(problems, outputs, strict=True):
        place = read_answer(output, len(problem.choices))
        unread += place is None
        if place is None and readout == "original":
            place = random.Random(f"{seed} {problem.id}").randrange(len(problem.choices))
        for name in ("", *categories(problem)):
            right[name].append(place == problem.answer)
    accuracies = {f"accuracy_{name}" if name else "accuracy": sum(r) / len(r) for name, r in right.items() if r}
    return accuracies, {"unread": unread, **{name: len(r) for name, r in right.items() if name and r}}
