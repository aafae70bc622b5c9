"""MMBench: single-choice questions about images, in all rotations of their options (Liu et al., arXiv 2307.06281).

A tab-separated file with ``index``, ``question``, ``A`` to ``D`` or more, ``image`` (base64, or the index of the row
that has it), and perhaps ``hint``, ``answer``, ``category``, ``l2-category``. Rows whose index is the same but for
millions are one question in several rotations; the smallest index is the question as it was written.
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
import string
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from zinit.data.images import Encoded, check_image
from zinit.data.records import check_text, describe, whole_number
from zinit.errors import DataError
from zinit.files import is_file, is_folder, parsing
from zinit.suites.base import Question, Scores, Suite, mean

ROTATION = 1_000_000  # added to the index of each further rotation
LETTERS = string.ascii_uppercase[:8]
PUNCTUATION = ".,:;!?()[]{}*'\"`"
QUANTIFIER_WORDS = 3  # "A" in a longer text is an article
INSTRUCTION = "Answer with the letter of the right option."
NEEDED = ("index", "question", "A", "B", "image")
LEVELS = ("l2-category", "category")


@dataclass(frozen=True, kw_only=True)
class Choice(Question):
    """A row: one question in one rotation.

    Attributes:
        index: its number.
        options: {letter: text}.
        levels: its category on each level that the file has.
    """

    index: int
    options: Mapping[str, str]
    levels: Mapping[str, str]

    @property
    def number(self) -> int:
        """Of the question, whatever the rotation."""
        return self.index % ROTATION


class MMBench(Suite):
    """Vanilla: each question as it was written. Circular: right only if all rotations of it are."""

    name = "mmbench"
    questions: Sequence[Choice]  # pyright: ignore[reportIncompatibleVariableOverride]

    def read(self, source: Path) -> list[Choice]:
        file = _single_file(source) if is_folder(source) else source
        if not is_file(file):
            raise DataError(f"there is no file {file}. Expected MMBench's .tsv, or a folder with it.")
        rows = _rows(file)
        images = {row["index"]: row["image"] for row in rows}
        found = [_choice(row, images, f"{file}, row {number}") for number, row in enumerate(rows, start=1)]
        self._check(found, file)
        return found

    def _check(self, found: Sequence[Choice], file: Path) -> None:
        """Every rotation has its question, and no row is there twice."""
        ((index, count),) = Counter(choice.index for choice in found).most_common(1)
        if count > 1:
            raise DataError(f"{file} has the index {index} {count} times.")
        self._rotations: dict[int, list[Choice]] = defaultdict(list)
        for choice in sorted(found, key=lambda choice: choice.index):
            self._rotations[choice.number].append(choice)
        for number, rotations in self._rotations.items():
            if rotations[0].index != number:
                raise DataError(
                    f"{file}: the row {rotations[0].index} is a rotation of a question {number} that is not there."
                )
        self.rotated = any(len(rotations) > 1 for rotations in self._rotations.values())
        whole = [rotations for rotations in self._rotations.values() if len(rotations) == len(rotations[0].options)]
        self.counts["in_all_rotations"] = len(whole)
        self.counts["without_all_rotations"] = len(self._rotations) - len(whole)

    def score(self, outputs: Sequence[str]) -> Scores:
        """As "vanilla" and, where there are rotations, "circular" over the questions that have them all; each also by
        category. An answer of which no option can be read is wrong, and counted as "unread".
        """
        letters = [read_option(output, choice.options) for output, choice in zip(outputs, self.questions, strict=True)]
        counts = {"unread": letters.count(None)}
        if not any(choice.answers for choice in self.questions):
            return Scores(metrics={"unread": counts["unread"] / len(letters)}, counts=counts)
        right = {c.index: letter in c.answers for c, letter in zip(self.questions, letters, strict=True)}
        results = {"vanilla": [(rows[0], right[rows[0].index]) for rows in self._rotations.values()]}
        if self.rotated:
            results["circular"] = [
                (rows[0], all(right[row.index] for row in rows))
                for rows in self._rotations.values()
                if len(rows) == len(rows[0].options)
            ]
        metrics = {}
        for rule, found in results.items():
            metrics[rule] = mean([is_right for _, is_right in found])
            by_category = defaultdict(list)
            for choice, is_right in found:
                for level in choice.levels.values():
                    by_category[level].append(is_right)
            metrics |= {f"{rule}_{name}": mean(own) for name, own in by_category.items()}
        return Scores(metrics=metrics, counts=counts)

    def table(self, outputs: Sequence[str]) -> str:
        """A row for each row of the file, with the output as "prediction": what the owners' page scores."""
        letters = [letter for letter in LETTERS if any(letter in choice.options for choice in self.questions)]
        text = io.StringIO()
        writer = csv.writer(text, delimiter="\t", lineterminator="\n")
        writer.writerow(["index", "question", *letters, "prediction"])
        for choice, output in zip(self.questions, outputs, strict=True):
            options = [choice.options.get(letter, "") for letter in letters]
            writer.writerow([choice.index, choice.text, *options, output])
        return text.getvalue()


def read_option(output: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that an answer names; None if it names none or several.

    In this order: one letter alone among the words, though not "A" in a text of more than three words; one letter with
    punctuation around it; the text of exactly one option.

    Args:
        output: what the model wrote.
        options: {letter: text}.
    """
    words = output.split()
    bare = {word for word in words if word in options and (word != "A" or len(words) <= QUANTIFIER_WORDS)}
    marked = {word.strip(PUNCTUATION) for word in words if word not in options} & options.keys()
    texts = {letter for letter, text in options.items() if text and text.casefold() in output.casefold()}
    for found in (bare, marked, texts):
        if len(found) == 1:
            return found.pop()
    return None


def _rows(file: Path) -> list[dict[str, str]]:
    """The rows of a file, all cells as text."""
    import pandas

    with parsing(f"{file} is no table of tab-separated values", DataError):
        table = pandas.read_csv(file, sep="\t", dtype=str, keep_default_na=False)
    if missing := [name for name in NEEDED if name not in table.columns]:
        raise DataError(f"{file} has no column {missing[0]}; MMBench's has {', '.join(NEEDED)}.")
    if table.empty:
        raise DataError(f"{file} has no rows.")
    return table.to_dict("records")  # pyright: ignore[reportReturnType]


def _choice(row: Mapping[str, str], images: Mapping[str, str], where: str) -> Choice:
    index = whole_number(float(row["index"])) if row["index"].replace(".", "").isdigit() else None
    if index is None:
        raise DataError(f"{where}: 'index' must be a whole number; got {describe(row['index'])}.")
    options = {letter: row[letter] for letter in LETTERS if row.get(letter, "").strip()}
    answer = row.get("answer", "").strip()
    if len(options) < 2 or list(options) != list(LETTERS[: len(options)]):
        raise DataError(f"{where}: expected two options or more from A on; got {', '.join(options) or 'none'}.")
    if answer and answer not in options:
        raise DataError(f"{where}: 'answer' must be one of {', '.join(options)}; got {describe(answer)}.")
    for text in (row["question"], row.get("hint", ""), *options.values()):
        check_text(text, "question, hint or options", where)
    lines = [row.get("hint", "").strip(), row["question"].strip(), *(f"{k}. {text}" for k, text in options.items())]
    return Choice(
        id=str(index),
        index=index,
        text=row["question"].strip(),
        prompt="\n".join([*filter(None, lines), INSTRUCTION]),
        image=_image(row["image"], images, where),
        answers=(answer,) if answer else (),
        options=options,
        levels={level: row[level].strip() for level in LEVELS if row.get(level, "").strip()},
    )


def _image(content: str, images: Mapping[str, str], where: str) -> Encoded:
    content = images.get(content, content)  # a number stands for another row's
    try:
        data = base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: 'image' holds no base64: {error}.") from error
    image = Encoded(where, partial(bytes, data))
    check_image(image)
    return image


def _single_file(folder: Path) -> Path:
    files = sorted(folder.glob("*.tsv"))
    if len(files) != 1:
        raise DataError(
            f"{folder}: expected one .tsv file; found {', '.join(f.name for f in files) or 'none'}. Name one."
        )
    return files[0]
