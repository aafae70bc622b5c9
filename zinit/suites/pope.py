"""POPE: yes-no questions about what is in an image (Li et al., arXiv 2305.10355).

A folder with ``*random*.json``, ``*popular*.json``, ``*adversarial*.json`` (JSON lines of image, text, label), and the
images beside them or in a folder of it. What is asked for is drawn at random, or frequent, or often goes together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from zinit.data.images import check_image, inside
from zinit.data.records import check_text, describe, each_record, read_document
from zinit.errors import DataError
from zinit.files import is_file, is_folder
from zinit.suites.base import Question, Scores, Suite, mean, read_yes_no

KINDS = ("random", "popular", "adversarial")
FIELDS = ("image", "text", "label")


class Pope(Suite):
    """Accuracy, and precision, recall and F1 of "yes". Answers are read as MME's are."""

    name = "pope"

    def read(self, source: Path) -> list[Question]:
        if not is_folder(source):
            raise DataError(f"there is no folder {source}. Expected one with POPE's files and images.")
        found: list[Question] = []
        for kind in KINDS:
            files = [file for suffix in ("json", "jsonl") for file in sorted(source.glob(f"*{kind}*.{suffix}"))]
            if len(files) > 1:
                raise DataError(f"{source} has several files of {kind} objects: {', '.join(f.name for f in files)}.")
            for file in files:
                found += self._file(file, kind)
        if not found:
            raise DataError(f"{source} has none of *{'*.json, *'.join(KINDS)}*.json with questions.")
        return found

    def _file(self, file: Path, kind: str) -> Iterator[Question]:
        document, name = read_document(str(file))
        if isinstance(document, dict | str):
            raise DataError(f"{name}: expected JSON lines of {', '.join(FIELDS)}; got {describe(document)}.")
        for number, record in enumerate(each_record(document, name), start=1):
            where = f"{name}, record {number}"
            if not isinstance(record, dict) or not all(isinstance(record.get(field), str) for field in FIELDS):
                raise DataError(f"{where}: expected the texts {', '.join(FIELDS)}; got {describe(record)}.")
            label = record["label"].strip().lower()
            if label not in ("yes", "no"):
                raise DataError(f"{where}: 'label' must be yes or no; got {describe(record['label'])}.")
            text = check_text(record["text"], "text", where)
            yield Question(
                id=f"{kind}/{number}",
                text=text,
                image=_image(file.parent, record["image"], where),
                answers=(label,),
                category=kind,
            )

    def score(self, outputs: Sequence[str]) -> Scores:
        """Over all questions and by kind of objects: accuracy, precision, recall, F1, and the share answered "yes". An
        answer that is neither is wrong, counts as no "yes", and is counted as "unread".
        """
        said = [read_yes_no(output) for output in outputs]
        metrics, counts = {}, {"unread": said.count(None)}
        for kind in ("", *KINDS):
            own = [
                (answer, question.answers[0] == "yes")
                for answer, question in zip(said, self.questions, strict=True)
                if kind in ("", question.category)
            ]
            if own:
                metrics |= {f"{name}_{kind}" if kind else name: value for name, value in _figures(own).items()}
                counts |= {f"questions_{kind}": len(own)} if kind else {}
        return Scores(metrics=metrics, counts=counts)


def _figures(pairs: Sequence[tuple[bool | None, bool]]) -> dict[str, float]:
    """Figures of (said, true) pairs; 0 where a share has nothing below the line."""
    both, yes, true = (sum(test) for test in zip(*((s is True and t, s is True, t) for s, t in pairs), strict=True))
    return {
        "accuracy": mean([s is t for s, t in pairs]),
        "precision": both / yes if yes else 0.0,
        "recall": both / true if true else 0.0,
        "f1": 2 * both / (yes + true) if yes + true else 0.0,
        "yes": yes / len(pairs),
    }


def _image(folder: Path, name: str, where: str) -> Path:
    """An image beside the file, or in a folder beside it."""
    places = [folder, *(place for place in sorted(folder.iterdir()) if place.is_dir())]
    for place in places:
        if is_file(path := inside(place, name)):
            check_image(path)
            return path
    raise DataError(f"{where}: there is no image {name} in {folder} or a folder of it.")
