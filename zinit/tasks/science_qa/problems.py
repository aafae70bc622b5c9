"""ScienceQA's problems: read, checked and divided as ``pid_splits.json`` says."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zinit.data.images import check_image, inside
from zinit.data.records import check_text, describe, read_json_text, unused_fields, whole_number
from zinit.errors import ConfigError, DataError
from zinit.files import is_file, is_folder, local_path
from zinit.tasks.base import DataInputs
from zinit.tasks.experts import Experts, Said
from zinit.tasks.science_qa.config import ScienceQAConfig
from zinit.validation import OnBad

LETTERS = "ABCDE"  # of the options
PROBLEMS, SPLITS = "problems.json", "pid_splits.json"
TEXTS = ("question", "hint", "lecture", "solution", "subject")
NEEDED = ("question", "choices", "answer", "subject", "grade")
DESCRIPTIVE = ("task", "topic", "category", "skill")  # fields that the protocol has no use for
READ = (*TEXTS, "choices", "answer", "grade", "image", "split", *DESCRIPTIVE)
NAMED = 8  # reasons that a report names


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One multiple-choice question.

    Attributes:
        id: of the problem (its "pid").
        question: what is asked.
        choices: the options.
        answer: place of the right one.
        hint: textual context; may be empty.
        lecture: what the skill is about; may be empty.
        solution: explanation of the answer; may be empty.
        subject: "natural science", "social science" or "language science".
        grade: 1 to 12.
        has_image: whether it comes with an image, wherever that may be.
        image: its file; None if there is none, or images are left out.
        said: what experts say about the image; see `zinit.tasks.experts`.
    """

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int
    hint: str = ""
    lecture: str = ""
    solution: str = ""
    subject: str
    grade: int
    has_image: bool = False
    image: Path | None = None
    said: Said = ()


@dataclass(kw_only=True)
class ProblemFolder:
    """A folder with ``problems.json``, ``pid_splits.json`` and ``images/SPLIT/PID/IMAGE``.

    ``counts["read"]`` = problems of the splits that were taken + ``not_used`` (of other splits) + what was skipped.

    Args:
        folder: of the data.
        on_bad: "error" stops at the first problem that cannot be used; "skip" leaves it out and notes why.
        images: whether images are looked at; False takes the texts alone.

    Attributes:
        counts: of what was read, and what became of it.
        reasons: why problems were skipped, for the first few.

    Raises:
        DataError: if a file is missing or not of this form.
    """

    folder: Path
    on_bad: OnBad = "error"
    images: bool = True
    counts: Counter[str] = field(default_factory=Counter, init=False)
    reasons: list[str] = field(default_factory=list, init=False)
    unused: Counter[str] = field(default_factory=Counter, init=False)
    _seen: set[str] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        if not is_folder(self.folder):
            raise DataError(f"there is no folder {self.folder}. Expected one with {PROBLEMS} and {SPLITS}.")
        for name in (PROBLEMS, SPLITS):
            if not is_file(self.folder / name):
                raise DataError(f"{self.folder} has no {name}. ScienceQA's folder has {PROBLEMS} and {SPLITS}.")
        self.problems, splits = (read_json_text(self.folder / name) for name in (PROBLEMS, SPLITS))
        if not isinstance(self.problems, dict) or not self.problems:
            raise DataError(
                f"{self.folder / PROBLEMS}: expected an object {{id: problem}}; got {describe(self.problems)}."
            )
        if not isinstance(splits, dict) or not all(
            isinstance(ids, list) and all(isinstance(i, str) for i in ids) for ids in splits.values()
        ):
            raise DataError(f"{self.folder / SPLITS}: expected an object {{split: [id, ...]}}; got {describe(splits)}.")
        self.splits: dict[str, list[str]] = splits
        self.counts["read"] = len(self.problems)
        known = {pid for ids in splits.values() for pid in ids}
        for pid in self.problems:
            if pid not in known:
                self._bad(
                    "skipped_not_in_a_split",
                    f"{self.folder / PROBLEMS}: the problem {pid!r} is in no split of {SPLITS}.",
                )

    @classmethod
    def of(cls, source: str, *, on_bad: OnBad = "error", images: bool = True) -> ProblemFolder:
        """The folder of a source as a user names it; ``problems.json`` itself will do."""
        path = local_path(source)
        return cls(folder=path.parent if path.name == PROBLEMS else path, on_bad=on_bad, images=images)

    def take(self, split: str, without: Iterable[str] = ()) -> list[Problem]:
        """The problems of a split, in its order; each problem is given out, or counted as skipped, once.

        Args:
            split: its name.
            without: ids to leave out, of problems that are tested on.

        Raises:
            DataError: if there is no such split, or a problem cannot be used and is not to be skipped.
        """
        if split not in self.splits:
            raise DataError(
                f"{self.folder / SPLITS} has no split {split!r}; it has {', '.join(self.splits) or 'none'}."
            )
        ids, without, found = self.splits[split], set(without), []
        for pid in dict.fromkeys(ids):
            if pid not in self.problems:
                self._bad(
                    "ids_without_problem",
                    f"{self.folder / SPLITS}: {split!r} names {pid!r}, and {PROBLEMS} has no such problem.",
                )
                continue
            seen = pid in self._seen
            self._seen.add(pid)
            if pid in without:
                self.counts["train_ids_also_held_out" if seen else "train_skipped_also_held_out"] += 1
            elif not seen and (problem := self._problem(pid, split)) is not None:
                found.append(problem)
        return found

    def report(self, *taken: str) -> Counter[str]:
        """The counts, when the splits that are named have been taken."""
        used = {pid for split in taken for pid in self.splits[split]}
        others = {pid for ids in self.splits.values() for pid in ids} - used
        return self.counts + Counter(not_used=sum(pid in others for pid in self.problems)) + self.unused

    def _problem(self, pid: str, split: str) -> Problem | None:
        """A checked problem; None if it is skipped."""
        record, where = self.problems[pid], f"{self.folder / PROBLEMS}, problem {pid!r}"
        try:
            problem = _check(record, pid, where)
            image = self._image(record, pid, split, where) if self.images else None
        except DataError as error:
            self._bad("skipped_unusable", str(error))
            return None
        self.unused.update(unused_fields(record, READ))
        return problem if image is None else replace(problem, image=image)

    def _image(self, record: Mapping[str, Any], pid: str, split: str, where: str) -> Path | None:
        name, part = record.get("image"), record.get("split", split)
        if not name:
            return None
        try:
            image = inside(self.folder / "images", f"{part}/{pid}/{name}")
            check_image(image)
        except DataError as error:
            raise DataError(f"{where}: {error} To leave all images out: -o task.images=false.") from error
        return image

    def _bad(self, kind: str, message: str) -> None:
        """A problem cannot be used; see ``on_bad``."""
        if self.on_bad == "error":
            raise DataError(f"{message} To skip and count such problems: -o task.on_bad=skip")
        self.counts[kind] += 1
        self.reasons = [*self.reasons, message][:NAMED]


def read_problems(inputs: DataInputs, config: ScienceQAConfig) -> tuple[list[Problem], list[Problem], dict[str, Any]]:
    """Training and held-out problems: none is in both.

    Returns:
        Both parts, and counts: what was read is what both parts hold + ``not_used`` + what was skipped.

    Raises:
        ConfigError: if there is no data.
        DataError: if they cannot be used.
    """
    here, elsewhere = inputs.source or "", config.held_out_data
    if not here and (inputs.train or elsewhere is None):
        raise ConfigError(f"the task science-qa has no data of its own. Name a folder with {PROBLEMS}: --data FOLDER")
    options: dict[str, Any] = {"on_bad": config.on_bad, "images": config.images or bool(config.experts)}
    held_out_folder = ProblemFolder.of(here if elsewhere is None else elsewhere, **options)
    held_out = held_out_folder.take(config.split)
    training, counts, taken, folders = [], Counter[str](), [config.split], [held_out_folder]
    if inputs.train:
        folder = held_out_folder if elsewhere is None else ProblemFolder.of(here, **options)
        training = folder.take(config.train_split, without=[problem.id for problem in held_out])
        if not training:
            raise DataError(f"nothing is left to train on: {dict(folder.counts)}. Choose: -o task.train_split=NAME")
        if folder is held_out_folder:
            taken.append(config.train_split)
        else:
            counts, folders = folder.report(config.train_split), [folder, held_out_folder]
    counts += held_out_folder.report(*taken)
    for part, problems in (("train", training), ("held_out", held_out)):
        if not config.images:
            counts[f"{part}_images_left_out"] = sum(problem.has_image for problem in problems)
    if config.experts:
        held_out = _with_experts(held_out, Experts([inputs.make_expert(words) for words in config.experts]))
    reasons = [reason for folder in folders for reason in folder.reasons]
    return training, held_out, {**counts, **({"reasons": reasons} if reasons else {})}


def _with_experts(problems: Sequence[Problem], experts: Experts) -> list[Problem]:
    """The problems with what experts say about their images."""
    shown = [problem for problem in problems if problem.image is not None]
    said = experts([([problem.image], problem.question) for problem in shown if problem.image is not None])
    told = {problem.id: replace(problem, said=texts) for problem, texts in zip(shown, said, strict=True)}
    return [told.get(problem.id, problem) for problem in problems]


def _check(record: Any, pid: str, where: str) -> Problem:
    """A problem without its image."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object with {', '.join(NEEDED)}; got {describe(record)}.")
    if missing := [name for name in NEEDED if record.get(name) is None]:
        raise DataError(f"{where} has no {missing[0]!r}; every problem needs {', '.join(NEEDED)}.")
    texts = {}
    for name in TEXTS:
        texts[name] = record.get(name) or ""
        if not isinstance(texts[name], str):
            raise DataError(f"{where}: {name!r} must be text; got {describe(texts[name])}.")
        check_text(texts[name], name, where)
    choices, answer, image = record["choices"], whole_number(record["answer"]), record.get("image")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{where}: 'choices' must be a list of texts; got {describe(choices)}.")
    if not 2 <= len(choices) <= len(LETTERS):
        raise DataError(f"{where}: {len(choices)} choices; expected 2 to {len(LETTERS)}.")
    if answer is None or not 0 <= answer < len(choices):
        raise DataError(
            f"{where}: 'answer' is {describe(record['answer'])}; expected a place in 'choices', 0 to "
            f"{len(choices) - 1}."
        )
    if image is not None and not isinstance(image, str):
        raise DataError(f"{where}: 'image' must be a file name or null; got {describe(image)}.")
    grade = re.fullmatch(r"grade(\d{1,2})", str(record["grade"]))
    if grade is None:
        raise DataError(f"{where}: 'grade' must be grade1 to grade12; got {describe(record['grade'])}.")
    for choice in choices:
        check_text(choice, "choices", where)
    return Problem(
        id=pid,
        choices=tuple(choices),
        answer=answer,
        grade=int(grade[1]),
        has_image=bool(image),
        **texts,
    )
