"""MME: yes-no questions about images, two of each (Fu et al., arXiv 2306.13394).

A folder of subtasks. Each has the images and, for each, a text file of the same name with two lines: question, tab, Yes
or No. The files lie beside the images, or both in folders of their own (``images``, ``questions_answers_YN``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from zinit.data.images import check_image
from zinit.data.records import describe, read_text
from zinit.errors import DataError
from zinit.files import is_folder, is_hidden
from zinit.suites.base import IMAGE_SUFFIXES, Question, Scores, Suite, mean, read_yes_no

PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
AN_IMAGE = 2  # questions


class Mme(Suite):
    """A subtask's score is its accuracy over questions plus that over images of which both are right, in percent."""

    name = "mme"

    def read(self, source: Path) -> list[Question]:
        if not is_folder(source):
            raise DataError(f"there is no folder {source}. Expected one with a folder for each of MME's subtasks.")
        names = {
            entry.name: entry for entry in sorted(source.iterdir()) if entry.is_dir() and not is_hidden(entry.name)
        }
        found = [
            question for name in (*PERCEPTION, *COGNITION) if name in names for question in self._subtask(names[name])
        ]
        if not found:
            raise DataError(
                f"{source} has none of MME's subtasks ({', '.join((*PERCEPTION, *COGNITION))}); it has "
                f"{', '.join(names) or 'no folder'}."
            )
        self.counts["subtasks"] = len({question.category for question in found})
        self.counts["folders_not_used"] = len(names.keys() - {*PERCEPTION, *COGNITION})
        return found

    def _subtask(self, folder: Path) -> Iterator[Question]:
        places = [place for name in ("", "images", "questions_answers_YN") if is_folder(place := folder / name)]
        files = [file for place in places for file in sorted(place.iterdir()) if not is_hidden(file.name)]
        images = {file.stem: file for file in files if file.suffix.lower() in IMAGE_SUFFIXES}
        texts = {file.stem: file for file in files if file.suffix == ".txt"}
        self.counts["images_without_questions"] += len(images.keys() - texts.keys())
        for stem, file in texts.items():
            if stem not in images:
                raise DataError(f"{file} asks about an image {stem}, which is not in {folder}.")
            check_image(images[stem])
            yield from _questions(file, images[stem], folder.name)

    def score(self, outputs: Sequence[str]) -> Scores:
        """Each subtask's score, of 200; "perception" and "cognition", their sums, where all subtasks of one are there;
        "accuracy" over all questions. An answer that is neither yes nor no is wrong, and counted as "unread".
        """
        answers = [read_yes_no(output) for output in outputs]
        right = {
            question.id: answer is not None and answer == (question.answers[0] == "yes")
            for question, answer in zip(self.questions, answers, strict=True)
        }
        scores = {name: self._score(name, right) for name in dict.fromkeys(q.category for q in self.questions)}
        metrics = dict(scores)
        for total, parts in (("perception", PERCEPTION), ("cognition", COGNITION)):
            if all(name in scores for name in parts):
                metrics[total] = sum(scores[name] for name in parts)
        metrics["accuracy"] = mean(list(right.values()))
        return Scores(metrics=metrics, counts={"unread": answers.count(None)})

    def _score(self, subtask: str, right: dict[str, bool]) -> float:
        own = [question for question in self.questions if question.category == subtask]
        by_image: dict[str, list[bool]] = {}
        for question in own:
            by_image.setdefault(str(question.image), []).append(right[question.id])
        return 100 * (mean([right[question.id] for question in own]) + mean([all(pair) for pair in by_image.values()]))


def _questions(file: Path, image: Path, subtask: str) -> Iterator[Question]:
    lines = [line for line in read_text(file).splitlines() if line.strip()]
    if len(lines) != AN_IMAGE:
        raise DataError(
            f"{file}: expected two questions about the image {image.name}; got {len(lines)}. MME's accuracy+ is over "
            f"images of which both are answered: restore the file."
        )
    for number, line in enumerate(lines, start=1):
        text, tab, answer = line.rpartition("\t")
        if not tab or answer.strip().lower() not in ("yes", "no"):
            raise DataError(f"{file}, line {number}: expected question, tab, Yes or No; got {describe(line)}.")
        yield Question(
            id=f"{subtask}/{image.name}/{number}",
            text=text.strip(),
            image=image,
            answers=(answer.strip().lower(),),
            category=subtask,
        )
