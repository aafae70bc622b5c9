"""Extractive question answering, SQuAD v1.1 and v2.0 (pipeline of P-tuning v2, ACL 2022)."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from zinit.data.records import count_sources, most_unused, same_text
from zinit.distributed import map_over_ranks, most_over_processes
from zinit.errors import ConfigError, DataError
from zinit.metrics import METRICS
from zinit.models.room import check_lengths
from zinit.tasks._drift import Drift
from zinit.tasks._encoder import check_encoder, head_logits, make_head, pad, paper_figure, takes_token_types
from zinit.tasks.base import Batch, DataInputs, Evaluation, Stream, Task, TaskInputs
from zinit.tasks.squad.config import SquadConfig
from zinit.tasks.squad.questions import Question, parse_questions, read_questions, split_questions, train_and_dev
from zinit.tasks.squad.windows import Window, best_answer, make_windows

if TYPE_CHECKING:
    from accelerate import Accelerator

NO_ANSWER = "(no answer)"


class Squad(Task):
    """See the module. Needs an encoder and its fast tokenizer; the head is trained along.

    Attributes:
        blind: whether the held-out questions have no answers, as those of a test set: they are answered, not measured.
        predictions: {question id: answer} of the last evaluation, as the official scripts read them.
        null_odds: {question id: how much better "no answer" scores than the best answer}.
    """

    name = "squad"
    hub_task = "question-answering"
    Config = SquadConfig
    loader = "zinit.models.loading:load_encoder"
    reads_texts = True
    baseline = "the frozen model with an untrained head"
    metric = "f1"
    reads_several = True
    without_direction = ("best_exact_match_threshold", "best_f1_threshold")

    def __init__(self, inputs: TaskInputs, config: SquadConfig) -> None:
        super().__init__(inputs, config)
        self.tokenizer = inputs.processor
        check_encoder(self.model, self.tokenizer, config.max_length)
        _check_room(config, self.tokenizer)
        self.head = make_head(self.model, 2, inputs.seed)
        self.train_questions, self.held_out_questions, self._counts = self.take_data(inputs, config)
        self.train_questions, self.train_windows = self._encode(self.train_questions, "train")
        self.held_out_questions, self.held_out_windows = self._encode(self.held_out_questions, "held_out")
        self.blind = any(question.blind for question in self.held_out_questions)
        self.train_stream = _stream("train", self.train_windows)
        self.held_out_stream = _stream("held_out", [] if self.blind else self.held_out_windows)
        check_lengths(self.model, *([len(w.ids) for w in part] for part in (self.train_windows, self.held_out_windows)))
        self.unanswerable = _has_unanswerable(config, [*self.train_questions, *self.held_out_questions])
        self.predictions: dict[str, str] = {}
        self.null_odds: dict[str, float] = {}
        self._drift = Drift()

    @classmethod
    def read_data(
        cls, inputs: DataInputs, config: SquadConfig
    ) -> tuple[list[Question], list[Question], dict[str, int]]:
        """Training and held-out questions, and counts."""
        return _split(config, inputs.sources, inputs.seed, train=inputs.train)

    def _encode(self, questions: list[Question], part: str) -> tuple[list[Question], list[Window]]:
        """The questions of which something is left, and their windows."""
        windows = make_windows(
            self.tokenizer,
            questions,
            max_length=self.config.max_length,
            stride=self.config.stride,
            max_question=self.config.max_question,
            types=takes_token_types(self.model, self.tokenizer),
        )
        self._counts |= {
            part: len(windows.questions),
            f"{part}_windows": len(windows.items),
            f"{part}_truncated_questions": windows.truncated_questions,
            f"{part}_truncated_answers": windows.unreachable,
        }
        if blank := len(questions) - len(windows.questions):
            self._counts[f"{part}_skipped_blank_question"] = blank
        if questions and not windows.questions:
            raise DataError(f"all {len(questions)} questions of the {part} part are blank.")
        return windows.questions, windows.items

    def collate(self, stream: Stream, indices: Sequence[int]) -> Batch:
        """What `pad` makes, with the positions ``starts`` and ``ends`` (B,) of the answers' first and last tokens."""
        chosen: list[Window] = [stream.examples[index] for index in indices]
        batch = self._pad(chosen)
        for name in ("start", "end"):
            batch[f"{name}s"] = torch.tensor([getattr(window, name) for window in chosen])
        return batch

    def _pad(self, windows: Sequence[Window]) -> Batch:
        types = [window.types for window in windows if window.types is not None]
        return pad(self.tokenizer, [window.ids for window in windows], types or None)

    def _scores(self, batch: Batch) -> Tensor:
        """(B, T, 2): how well each token does as the first and as the last of the answer; -inf at padding."""
        scores = head_logits(self.model, self.head, batch)
        return scores.masked_fill(batch["attention_mask"][..., None] == 0, -torch.inf)

    def forward(self, batch: Batch) -> Tensor:
        """Cross-entropy of the answer's two ends over all positions, halved each, summed over the windows."""
        scores = self._scores(batch)
        starts = F.cross_entropy(scores[..., 0], batch["starts"], reduction="sum")
        return (starts + F.cross_entropy(scores[..., 1], batch["ends"], reduction="sum")) / 2

    def prepare(self) -> None:
        """Remembers the frozen model's features, if they are asked for."""
        self._measure_drift()

    def _measure_drift(self) -> dict[str, float]:
        """How far the tokens' features of the first held-out windows are from the frozen model's."""
        self.eval()
        chosen = self.held_out_windows[: self.config.drift]
        return self._drift.of_tokens(self.model, (self._pad([window]) for window in chosen))

    @torch.no_grad()
    def evaluate(self, accelerator: Accelerator, *, limit: int | None = None) -> Evaluation:
        """Exact match and F1 of the answers, in percent, as the official script of the data's version gives them.

        For v2.0 also what the best threshold would have given: ``best_exact_match``, ``best_f1``. It is chosen on the
        held-out questions themselves.
        """
        self.eval()
        questions = self.held_out_questions[:limit]
        if not questions:
            return Evaluation(metrics={})
        answers = map_over_ranks(accelerator, len(questions), lambda indices: self._answer(indices, accelerator))
        spans, odds = [text for _, text, _ in answers], [value for _, _, value in answers]
        refused = [self.unanswerable and value > self.config.null_threshold for value in odds]
        given = ["" if no else span for span, no in zip(spans, refused, strict=True)]
        ids = [question.id for question in questions]
        self.predictions = dict(zip(ids, given, strict=True))
        self.null_odds = dict(zip(ids, odds, strict=True))
        if self.blind:
            return Evaluation(metrics={}, counts={"questions": len(questions), "refused": sum(refused)})
        references = [list(question.answers) for question in questions]
        metric = METRICS.get("squad_v2" if self.unanswerable else "squad")()
        metrics = metric.compute(predictions=given, references=references)
        if self.unanswerable:
            best = metric.compute(predictions=spans, references=references, null_odds=odds)
            metrics |= {name: value for name, value in best.items() if name.startswith("best_")}
        samples = [
            {
                "prompt": f"{question.text}\n\n{question.context}",
                "expected": " | ".join(dict.fromkeys(question.answers)) or NO_ANSWER,
                "output": text or NO_ANSWER,
            }
            for question, text in zip(questions[:8], given, strict=False)
        ]
        counts = {"questions": len(questions), "unanswerable": sum(not texts for texts in references)}
        metrics |= self._measure_drift()
        return Evaluation(metrics=metrics, counts={**counts, "refused": sum(refused)}, samples=samples)

    @torch.no_grad()
    def _answer(
        self, indices: Sequence[int], accelerator: Accelerator | None = None, *, batch_size: int = 32
    ) -> list[tuple[int, str, float]]:
        """(question, best answer, null odds) of held-out questions; windows of like length go together."""
        device = next(self.model.parameters()).device
        wanted = set(indices)
        windows = [window for window in self.held_out_windows if window.question in wanted]
        order = sorted(range(len(windows)), key=lambda index: -len(windows[index].ids))
        scores: list[np.ndarray] = [np.empty(0)] * len(windows)
        turns = math.ceil(len(order) / batch_size)
        for turn in range(turns if accelerator is None else most_over_processes(accelerator, turns)):
            part = order[turn * batch_size :][:batch_size] or order[:batch_size]  # once more, to keep step with others
            batch = self._pad([windows[index] for index in part])
            scored = self._scores({name: tensor.to(device) for name, tensor in batch.items()}).cpu().numpy()
            for index, of_window in zip(part, scored, strict=True):
                scores[index] = of_window[: len(windows[index].ids)]
        of_question: dict[int, list[int]] = defaultdict(list)
        for index, window in enumerate(windows):
            of_question[window.question].append(index)
        found: dict[int, tuple[int, str, float]] = {}
        for question, places in of_question.items():
            span = best_answer(
                self.held_out_questions[question].context,
                [windows[place] for place in places],
                [scores[place] for place in places],
                n_best=self.config.n_best,
                max_answer=self.config.max_answer,
            )
            found[question] = (question, span.text, span.null_odds)
        return [found[index] for index in indices]

    def artifacts(self) -> dict[str, Any]:
        """The last evaluation's answers and null odds, as the official scripts read them."""
        return {"predictions.json": self.predictions, "null_odds.json": self.null_odds}

    @classmethod
    def paper_figure(cls, method: str, dataset: str, metric: str) -> float | None:
        return paper_figure(method, dataset, metric)

    def data_report(self) -> dict[str, Any]:
        """Counts of questions read, kept and skipped, of their windows, and of what was cut off."""
        return dict(self._counts)

    def fingerprint(self) -> str:
        """Over the token ids and targets of both parts."""
        digest = hashlib.sha256()
        for window in (*self.train_windows, *self.held_out_windows):
            digest.update(window.ids.tobytes() + repr((window.start, window.end)).encode())
        return digest.hexdigest()


def _stream(name: str, windows: list[Window]) -> Stream:
    return Stream(
        name=name,
        examples=windows,
        lengths=[len(window.ids) for window in windows],
        counts=[1] * len(windows),
    )


def _check_room(config: SquadConfig, tokenizer: Any) -> None:
    """The longest question leaves room for more of the context than windows share."""
    special = tokenizer.num_special_tokens_to_add(pair=True)
    left = config.max_length - config.max_question - special
    if left <= config.stride:
        raise ConfigError(
            f"windows of task.max_length={config.max_length} tokens hold {max(0, left)} tokens of the context beside "
            f"a question of task.max_question={config.max_question}; that must be more than task.stride="
            f"{config.stride}, which neighbouring windows share."
        )


def _split(
    config: SquadConfig, sources: Sequence[str], seed: int, *, train: bool
) -> tuple[list[Question], list[Question], dict[str, int]]:
    """Training and held-out questions: no context is in both."""
    skipped, unused = 0, Counter[str]()

    def read(files: Sequence[str], *, blind: bool = False) -> list[list[Question]]:
        """The questions of each file, which have ids of their own."""
        nonlocal skipped
        found, seen = [], dict[str, str]()
        for file in files:
            questions, bad = read_questions(
                file, skip_bad=config.on_bad == "skip", blind=blind, seen=seen, unused=unused
            )
            found.append(questions)
            skipped += bad
        return found

    train_files, dev_files = _files(sources)
    if config.held_out_data is not None:
        alone, dev = train_and_dev(config.held_out_data)
        dev_files = [dev or alone]
    by_source = read(train_files) if train or not dev_files else []
    training = list(itertools.chain.from_iterable(by_source))
    held_out = list(itertools.chain.from_iterable(read(dev_files, blind=not train)))
    if not train_files and (train or not dev_files):
        training, of_demo = _demo()
        held_out = held_out if dev_files else of_demo
    elif not dev_files:
        training, held_out = split_questions(training, seed, ", ".join(train_files))
    if not train:
        training = []
    contexts = {same_text(question.context) for question in held_out}
    clean = [question for question in training if same_text(question.context) not in contexts]
    counts = {
        "read": len(training) + len(held_out) + skipped,
        "skipped_bad": skipped,
        "train_skipped_also_held_out": len(training) - len(clean),
        **count_sources(by_source),
        **most_unused(unused),
    }
    return clean, held_out, counts


def _files(sources: Sequence[str]) -> tuple[list[str], list[str]]:
    """What of the sources is trained on, and what they hold out themselves."""
    pairs = [train_and_dev(source) for source in sources]
    return [train for train, _ in pairs], [dev for _, dev in pairs if dev is not None]


def _demo() -> tuple[list[Question], list[Question]]:
    from zinit import demo

    train, dev = demo.questions()
    return parse_questions(train, "the demo's questions")[0], parse_questions(dev, "the demo's held-out questions")[0]


def _has_unanswerable(config: SquadConfig, questions: list[Question]) -> bool:
    """Whether the data, or its set version, has unanswerable questions."""
    without = [question for question in questions if not (question.answers or question.blind)]
    if config.version == "1.1" and without:
        raise DataError(
            f"task.version is 1.1, but {len(without)} questions have no answer, the first is {without[0].id!r}. "
            f"Leave them out, or: -o task.version=2.0"
        )
    return config.version == "2.0" or (config.version == "auto" and bool(without))
