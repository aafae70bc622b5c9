"""Questions about images with short answers, in any number of data sets: what LVLM-eHub's (arXiv 2306.09265) are like.

Records (JSON, JSON lines, CSV, Parquet) with ``image``, ``question`` and ``answer`` or ``answers``; a field ``dataset``
or ``category`` tells figures apart. Images are seen from the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zinit.data.images import check_image, inside
from zinit.data.records import check_text, describe, each_record, plain_text, read_document, unused_fields
from zinit.errors import DataError
from zinit.metrics import METRICS
from zinit.suites.base import Question, Scores, Suite, mean

FIELDS = ("image", "question", "answer", "answers", "dataset", "category")


class Vqa(Suite):
    """The share of outputs that contain an answer."""

    name = "vqa"

    def read(self, source: Path) -> list[Question]:
        document, name = read_document(str(source))
        if isinstance(document, dict | str):
            raise DataError(f"{name}: expected records of image, question and answer; got {describe(document)}.")
        found = []
        for number, record in enumerate(each_record(document, name), start=1):
            found.append(_question(record, number, name))
            self.counts.update(unused_fields(record, FIELDS))
        return found

    def score(self, outputs: Sequence[str]) -> Scores:
        """The metric ``contains``: over all records; by data set, and the mean over these, where there are several."""
        contains = METRICS.get("contains")()
        right = [
            contains.score(output, question.answers) for output, question in zip(outputs, self.questions, strict=True)
        ]
        by_set: dict[str, list[bool]] = {}
        for question, found in zip(self.questions, right, strict=True):
            by_set.setdefault(question.category, []).append(found > 0)
        metrics = {"contains": mean([found > 0 for found in right])}
        if len(by_set) > 1:
            shares = {f"contains_{name or 'other'}": mean(own) for name, own in by_set.items()}
            metrics |= {"contains_mean_of_sets": sum(shares.values()) / len(shares), **shares}
        return Scores(metrics=metrics, counts={"unread": sum(not output.strip() for output in outputs)})


def _question(record: Any, number: int, name: str) -> Question:
    where = f"{name}, record {number}"
    if not isinstance(record, dict) or not isinstance(record.get("image"), str):
        raise DataError(f"{where}: expected image (a path), question and answer; got {describe(record)}.")
    given = record.get("answers", record.get("answer"))
    answers = [plain_text(answer) for answer in (given if isinstance(given, list) else [given])]
    question = plain_text(record.get("question"))
    if question is None or not question.strip():
        raise DataError(f"{where}: 'question' must be text; got {describe(record.get('question'))}.")
    if not answers or not all(answer and answer.strip() for answer in answers):
        raise DataError(f"{where}: 'answer' or 'answers' must be one or more texts; got {describe(given)}.")
    for text in (question, *answers):
        check_text(str(text), "question or answers", where)
    image = inside(Path(name).parent, record["image"])
    check_image(image)
    category = plain_text(record.get("dataset", record.get("category", ""))) or ""
    return Question(
        id=str(number), text=question, image=image, answers=tuple(str(answer) for answer in answers), category=category
    )
