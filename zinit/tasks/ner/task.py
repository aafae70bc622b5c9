"""Named entity recognition: a tag for every token, CoNLL style (recipes: P-tuning v2, ACL 2022)."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from zinit.data.records import count_sources, most_unused
from zinit.distributed import map_over_ranks
from zinit.errors import ConfigError, DataError
from zinit.models.room import check_lengths
from zinit.tasks._drift import Drift
from zinit.tasks._encoder import check_encoder, head_logits, make_head, pad, paper_figure
from zinit.tasks.base import Batch, DataInputs, Evaluation, Stream, Task, TaskInputs
from zinit.tasks.ner.config import TokenClassificationConfig
from zinit.tasks.ner.sentences import Sentence, plain_tag, read_sentences
from zinit.tasks.ner.windows import Window, make_windows

if TYPE_CHECKING:
    from accelerate import Accelerator

IGNORED = -100
OUTSIDE = "O"


class TokenClassification(Task):
    """See the module. Needs an encoder and its fast tokenizer; the head is trained along.

    Attributes:
        labels: all tags, in the order of the head's outputs.
    """

    name = "ner"
    hub_task = "token-classification"
    Config = TokenClassificationConfig
    loader = "zinit.models.loading:load_encoder"
    reads_texts = True
    baseline = "the frozen model with an untrained head"
    metric = "f1"
    reads_several = True

    def __init__(self, inputs: TaskInputs, config: TokenClassificationConfig) -> None:
        super().__init__(inputs, config)
        self.tokenizer = inputs.processor
        check_encoder(self.model, self.tokenizer, config.max_length)
        training, held_out, self._counts, labels = self.take_data(inputs, config)
        self.labels = self._labels = list(labels)
        self.head = make_head(self.model, len(self._labels), inputs.seed)
        self.held_out_sentences = held_out
        self.train_windows = self._encode(training, "train")
        self.held_out_windows = self._encode(held_out, "held_out")
        self.train_stream = _stream("train", self.train_windows)
        self.held_out_stream = _stream("held_out", self.held_out_windows)
        check_lengths(self.model, *([len(w.ids) for w in part] for part in (self.train_windows, self.held_out_windows)))
        self._predictions: list[list[str]] = []
        self._drift = Drift()

    @classmethod
    def read_data(
        cls, inputs: DataInputs, config: TokenClassificationConfig
    ) -> tuple[list[Sentence], list[Sentence], dict[str, int], list[str]]:
        """Training and held-out sentences, counts, and all labels."""
        given = inputs.labels or (None if config.labels is None else list(map(plain_tag, config.labels)))
        training, held_out, counts = _split(config, inputs.sources, inputs.seed, train=inputs.train, labels=given)
        return training, held_out, counts, _resolve_labels(given, training)

    def _encode(self, sentences: list[Sentence], part: str) -> list[Window]:
        index = {label: number for number, label in enumerate(self._labels)}
        windows: list[Window] = []
        split = skipped = 0
        for place, sentence in enumerate(sentences):
            for token, tag in zip(sentence.tokens, sentence.tags, strict=True):
                if tag not in index:
                    raise DataError(
                        f"{sentence.where}: the tag {tag!r} of the token {token!r} is not among the labels "
                        f"{', '.join(self._labels)}. Correct it, or name all labels: -o task.labels=..."
                    )
            labels = np.asarray([index[tag] for tag in sentence.tags], dtype=np.int64)
            found = make_windows(
                self.tokenizer,
                sentence,
                labels,
                place=place,
                max_length=self.config.max_length,
                stride=self.config.stride,
            )
            windows += found
            split += len(found) > 1
            skipped += len(labels) - sum(len(window.words) for window in found)
        self._counts |= {
            part: len(sentences),
            f"{part}_windows": len(windows),
            f"{part}_split_sentences": split,
            f"{part}_words": sum(len(sentence.tokens) for sentence in sentences),
            f"{part}_skipped_words_without_tokens": skipped,
        }
        return windows

    def collate(self, stream: Stream, indices: Sequence[int]) -> Batch:
        """What `pad` makes, with ``labels`` (B, T), ignored where no word begins."""
        chosen: list[Window] = [stream.examples[index] for index in indices]
        batch = pad(self.tokenizer, [window.ids for window in chosen])
        batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
        for place, window in enumerate(chosen):
            batch["labels"][place, torch.from_numpy(window.positions)] = torch.from_numpy(window.labels)
        return batch

    def forward(self, batch: Batch) -> Tensor:
        """Cross-entropy of the tags, summed over the words."""
        logits = head_logits(self.model, self.head, batch)
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum")

    def prepare(self) -> None:
        """Remembers the frozen model's features, if they are asked for."""
        self._measure_drift()

    def _measure_drift(self) -> dict[str, float]:
        """How far the words' features of the first held-out windows are from the frozen model's."""
        self.eval()
        chosen = self.held_out_windows[: self.config.drift]
        return self._drift.of_tokens(self.model, (pad(self.tokenizer, [window.ids]) for window in chosen))

    @torch.no_grad()
    def evaluate(self, accelerator: Accelerator, *, limit: int | None = None) -> Evaluation:
        """Precision, recall and F1 of whole entities, over all of them, and accuracy of the tags; all in percent.

        As conlleval counts: seqeval's default mode. A word that the tokenizer has no token for is taken for "O".
        """
        from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

        self.eval()
        sentences = self.held_out_sentences[:limit]
        if not sentences:
            return Evaluation(metrics={})
        wanted = [index for index, window in enumerate(self.held_out_windows) if window.sentence < len(sentences)]
        found = map_over_ranks(accelerator, len(wanted), lambda places: self._predict([wanted[i] for i in places]))
        missing = OUTSIDE if OUTSIDE in self._labels else self._labels[0]
        predicted = [[missing] * len(sentence.tokens) for sentence in sentences]
        for sentence, word, label in (word for window in found for word in window):
            predicted[sentence][word] = self._labels[label]
        expected = [list(sentence.tags) for sentence in sentences]
        self._predictions = predicted
        silent: Any = {"zero_division": 0}
        metrics = {
            "f1": f1_score(expected, predicted, **silent),
            "precision": precision_score(expected, predicted, **silent),
            "recall": recall_score(expected, predicted, **silent),
            "accuracy": accuracy_score(expected, predicted),
        }
        samples = [
            {
                "prompt": " ".join(sentence.tokens),
                "expected": _entities(sentence.tokens, sentence.tags),
                "output": _entities(sentence.tokens, tags),
            }
            for sentence, tags in zip(sentences[:8], predicted, strict=False)
        ]
        counts = {"sentences": len(sentences), "words": sum(map(len, expected))}
        return Evaluation(
            metrics={name: 100 * float(value) for name, value in metrics.items()} | self._measure_drift(),
            counts=counts,
            samples=samples,
            examples={"f1": [_overlap(*tags) for tags in zip(expected, predicted, strict=True)]},
        )

    @torch.no_grad()
    def _predict(self, indices: Sequence[int], *, batch_size: int = 32) -> list[list[tuple[int, int, int]]]:
        """(sentence, word, label) of every word of each window; windows of like length share a batch."""
        device = next(self.model.parameters()).device
        order = sorted(indices, key=lambda index: -len(self.held_out_windows[index].ids))
        found: dict[int, list[tuple[int, int, int]]] = {}
        for begin in range(0, len(order), batch_size):
            part = order[begin : begin + batch_size]
            chosen = [self.held_out_windows[index] for index in part]
            batch = pad(self.tokenizer, [window.ids for window in chosen])
            logits = head_logits(self.model, self.head, {name: tensor.to(device) for name, tensor in batch.items()})
            for index, window, best in zip(part, chosen, logits.argmax(dim=-1).cpu().numpy(), strict=True):
                labels = zip(window.words.tolist(), best[window.positions].tolist(), strict=True)
                found[index] = [(window.sentence, word, label) for word, label in labels]
        return [found[index] for index in indices]

    def artifacts(self) -> dict[str, Any]:
        """The last evaluation's tags."""
        sentences = [
            {"tokens": list(sentence.tokens), "expected": list(sentence.tags), "predicted": tags}
            for sentence, tags in zip(self.held_out_sentences, self._predictions, strict=False)
        ]
        return {"predictions.json": {"labels": self._labels, "sentences": sentences}}

    @classmethod
    def paper_figure(cls, method: str, dataset: str, metric: str) -> float | None:
        return paper_figure(method, dataset, metric)

    def data_report(self) -> dict[str, Any]:
        """Counts of sentences read and kept, of their windows and words, and of words the tokenizer has none for."""
        return dict(self._counts)

    def fingerprint(self) -> str:
        """Over the labels, and the token ids and targets of both parts."""
        digest = hashlib.sha256(repr(self._labels).encode())
        for window in (*self.train_windows, *self.held_out_windows):
            for array in (window.ids, window.positions, window.labels):
                digest.update(array.tobytes())
        return digest.hexdigest()


def _stream(name: str, windows: list[Window]) -> Stream:
    return Stream(
        name=name,
        examples=windows,
        lengths=[len(window.ids) for window in windows],
        counts=[len(window.words) for window in windows],
    )


def _entities(tokens: Sequence[str], tags: Sequence[str]) -> str:
    """Such as: PER: Ada Lovelace; LOC: London."""
    from seqeval.metrics.sequence_labeling import get_entities

    found = get_entities(list(tags))
    return "; ".join(f"{kind}: {' '.join(tokens[begin : end + 1])}" for kind, begin, end in found) or "(none)"


def _overlap(expected: Sequence[str], predicted: Sequence[str]) -> tuple[float, float]:
    """Of one sentence: 200 x entities found, and entities expected + predicted. Summed, their ratio is F1."""
    from seqeval.metrics.sequence_labeling import get_entities

    there, said = set(get_entities(list(expected))), set(get_entities(list(predicted)))
    return 200.0 * len(there & said), float(len(there) + len(said))


def _resolve_labels(given: list[str] | None, training: list[Sentence]) -> list[str]:
    if given is None and not training:
        raise ConfigError("without training data, name the labels: -o task.labels=O,B-PER,I-PER,...")
    labels = given
    if labels is None:
        seen = {tag for sentence in training for tag in sentence.tags}
        labels = sorted(seen, key=lambda tag: (tag != OUTSIDE, tag))
    if len(labels) < 2:
        raise DataError(f"there is only one tag in the training data, {labels[0]!r}: nothing to tell apart.")
    return labels


def _split(
    config: TokenClassificationConfig, sources: Sequence[str], seed: int, *, train: bool, labels: list[str] | None
) -> tuple[list[Sentence], list[Sentence], dict[str, int]]:
    """Training and held-out sentences; none is in both, unless the data is given in two parts that share some."""
    empty, skipped, unused = 0, Counter[str](), Counter[str]()

    def read(source: str) -> list[Sentence]:
        nonlocal empty
        columns = (config.token_column, config.tag_column)
        sentences, without = read_sentences(
            source, columns=columns, fields=config.fields, labels=labels, skipped=skipped, unused=unused
        )
        empty += without
        return sentences

    if not sources and (train or config.held_out_data is None):
        raise ConfigError("the task 'ner' has no embedded demo data: --data FILE_OR_HUB_ID.")
    if config.held_out_data is not None:
        held_out = read(config.held_out_data)
        by_source = [read(source) for source in sources] if train else []
        training = list(itertools.chain.from_iterable(by_source))
    else:
        by_source = [read(source) for source in sources]
        sentences = list(itertools.chain.from_iterable(by_source))
        if len(sentences) < 2:
            raise DataError(
                f"{', '.join(sources)} holds {len(sentences)} sentence; at least 2 are needed, one of them held out."
            )
        count = max(1, int(len(sentences) * config.held_out))
        order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(seed)).tolist()
        chosen = set(order[:count])
        held_out = [sentence for index, sentence in enumerate(sentences) if index in chosen]
        training = [sentence for index, sentence in enumerate(sentences) if index not in chosen]
    shared = {sentence.tokens for sentence in held_out}
    both = sum(sentence.tokens in shared for sentence in training)
    counts = {"read": len(training) + len(held_out) + empty, "skipped_empty": empty}
    counts |= {**count_sources(by_source), **skipped, **most_unused(unused)}
    if config.held_out_data is not None:  # the parts of a benchmark stay as they are
        return training, held_out, {**counts, "train_also_held_out": both}
    training = [sentence for sentence in training if sentence.tokens not in shared]
    return training, held_out, {**counts, "train_skipped_also_held_out": both}
