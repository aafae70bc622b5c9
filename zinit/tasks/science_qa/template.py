"""ScienceQA's text for a problem, in the orders of its authors' template builder (Lu et al., NeurIPS 2022)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from zinit.tasks.science_qa.config import Order
from zinit.tasks.science_qa.problems import LETTERS, Problem


def format_options(choices: Sequence[str]) -> str:
    """``(A) first (B) second``, on one line."""
    return " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def format_answer(problem: Problem) -> str:
    """What follows ``Answer:`` where nothing is explained."""
    return f" The answer is {LETTERS[problem.answer]}."


def format_problem(problem: Problem, order: Order) -> tuple[str, str]:
    """A problem's prompt, which ends in ``Answer:``, and what is to follow it.

    As in the original, every pair of blanks becomes one blank, an empty context is ``N/A``, and a line break in a
    lecture or an explanation is written as a backslash and an n. Unlike there, L is the lecture and E the explanation
    throughout: its orders AL and AE have the two the other way round.

    Args:
        problem: the problem.
        order: of the parts.
    """
    asked, answered = order.split("-")
    texts = {"L": _on_one_line(problem.lecture), "E": _on_one_line(problem.solution)}
    headed = {
        "Q": f"Question: {problem.question}",
        "C": f"Context: {problem.hint.strip() or 'N/A'}",
        "M": f"Options: {format_options(problem.choices)}",
    }
    lines = [
        headed[part] if part in headed else f"BECAUSE: {' '.join(texts[letter] for letter in part)}"
        for part in re.findall("[QCM]|[LE]+", asked)
    ]
    answer = format_answer(problem).strip()
    before, _, behind = answered.partition("A")
    reasons = " ".join(texts[letter] for letter in before + behind).strip()
    if reasons:
        answer = f"{reasons} {answer}" if before else f"{answer} BECAUSE: {reasons}"
    return _single_blanks("\n".join([*lines, "Answer:"])), _single_blanks(f" {answer}")


def _on_one_line(text: str) -> str:
    return text.replace("\n", "\\n")


def _single_blanks(text: str) -> str:
    return text.replace("  ", " ")
