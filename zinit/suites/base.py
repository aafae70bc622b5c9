"""What a suite is: questions about images from a user's folder, and scores of the answers to them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from zinit.data.images import ImageSource
from zinit.errors import ConfigError
from zinit.files import local_path

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question about one image.

    Attributes:
        id: what tells it from the others.
        text: what is asked.
        prompt: what the model is asked, where that is more than ``text``, such as with options.
        image: that it is about.
        answers: any of them is right; empty where the answers are not public.
        category: by which figures are told apart.
    """

    id: str
    text: str
    prompt: str = ""
    image: ImageSource
    answers: tuple[str, ...] = ()
    category: str = ""


@dataclass(kw_only=True)
class Scores:
    """What the answers to a suite's questions are worth.

    Attributes:
        metrics: name to value.
        counts: what stands behind them: answers that could not be read, questions of each kind.
    """

    metrics: dict[str, float]
    counts: dict[str, int] = field(default_factory=dict)


class Suite(ABC):
    """A suite, read from the user's data.

    Args:
        source: folder or file.

    Attributes:
        name: registered name.
        max_new_tokens: of an answer.
        questions: in order.
        counts: what was read; read equals asked plus what is counted as left out.

    Raises:
        DataError: if the data is not the suite's.
    """

    name: str
    max_new_tokens = 30
    questions: Sequence[Question]

    def __init__(self, source: str | Path) -> None:
        self.counts: Counter[str] = Counter()
        self.questions = self.read(local_path(source))
        self.counts["questions"] = len(self.questions)

    @abstractmethod
    def read(self, source: Path) -> Sequence[Question]:
        """The questions of a folder or file."""

    @abstractmethod
    def score(self, outputs: Sequence[str]) -> Scores:
        """What answers are worth, one for each question."""

    def table(self, outputs: Sequence[str]) -> str | None:
        """The file that the suite's owners score, as tab-separated text; None where nobody has to."""
        return None

    def check_output(self, output: str | Path | None) -> None:
        """Whether there is a place for what can only be handed in.

        Raises:
            ConfigError: if no answer is public, and no folder is named.
        """
        if output is None and not any(question.answers for question in self.questions):
            raise ConfigError(
                f"the data of {self.name} has no answers, so there is nothing to score here. Name a folder for the "
                f"table that its owners score: --output FOLDER"
            )


def read_yes_no(output: str) -> bool | None:
    """Whether an answer says yes; None if it says neither. It is read as MME's evaluations do: "yes" or "no" among the
    first four characters, or a bare "y" or "n", after lowering the case and taking dots away.
    """
    text = output.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": True, "n": False}.get(text)
    return True if "yes" in text[:4] else False if "no" in text[:4] else None


def mean(values: Sequence[bool]) -> float:
    """The share that is true; NaN of none."""
    return sum(values) / len(values) if values else float("nan")
