"""What tasks of causal language models share: encoded texts, the loss on their answers, greedy answers, images.

A subclass reads records, encodes them and scores answers.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zinit.compat import attention_implementation
from zinit.data.packing import pack_sequences, supports_packing
from zinit.data.records import read_text
from zinit.distributed import map_over_ranks
from zinit.errors import ConfigError, DataError
from zinit.files import local_path
from zinit.models.losses import chunked_cross_entropy, split_head
from zinit.models.room import check_lengths, check_positions
from zinit.tasks._images import Digests, TaskImages
from zinit.tasks.answers import answer_in_batches, by_room, continue_texts
from zinit.tasks.base import Batch, Evaluation, Stream, Task, TaskInputs

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from zinit.data.images import ImageSource
    from zinit.tasks.settings import TextConfig

SHOWN = 8  # samples of an evaluation


@dataclass(frozen=True, kw_only=True)
class TextExample:
    """One encoded text with its answers.

    Attributes:
        ids: BOS, text, EOS (cut at max_length).
        answers: ranges [start, end) of ids that are learned, in order; the last is what an evaluation asks for.
        instruction: what people read in place of the prompt.
        prompt: the text before the last answer.
        response: the last answer.
        images: of the example, in order.
        digests: of their content; the task fills them in.
        category: kind of the example, by which figures are told apart; empty has none.
        source: number of the data source it is from.
    """

    ids: list[int]
    answers: tuple[tuple[int, int], ...]
    instruction: str
    prompt: str
    response: str
    images: tuple[ImageSource, ...] = ()
    digests: tuple[bytes, ...] = ()
    category: str = ""
    source: int = 0

    @property
    def prompt_length(self) -> int:
        """How many of the first ids come before the last answer."""
        return self.answers[-1][0]

    @property
    def supervised(self) -> int:
        """How many ids carry loss."""
        return sum(end - start for start, end in self.answers)


class TextTask(Task):
    """See the module. Needs a causal language model of transformers and its tokenizer.

    `read_data` of a subclass returns (training records, held-out records, counts), in whatever form `encode` reads.

    Attributes:
        tokenizer: of the model.
        train_examples: encoded, as in ``train_stream``.
        held_out_examples: likewise.
        images: of the examples; None where none has any.
    """

    loader = "zinit.models.loading:load_causal_lm"
    hub_task = "text-generation"
    metric = "exact_match"
    generates = True
    reads_texts = True
    reads_several = True
    config: TextConfig

    def __init__(self, inputs: TaskInputs, config: TextConfig) -> None:
        super().__init__(inputs, config)
        model, self.tokenizer = inputs.model, inputs.processor
        if self.tokenizer.eos_token_id is None:
            raise ConfigError(f"{type(self.tokenizer).__name__} has no end-of-sequence token, which ends a response.")
        check_positions(model, config.max_length)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._split = split_head(model)  # a tuple, so that nothing is registered twice
        self._capacity = _capacity(model, config) if config.packing else None
        self._digests = Digests()
        training, held_out, self._counts = self.take_data(inputs, config)
        self.train_examples = self._encode(training, "train")
        self.held_out_examples = self._encode(held_out, "held_out")
        if not self.held_out_examples:
            raise DataError(
                f"nothing is left to evaluate on: {self._counts}. Raise task.max_length (now {config.max_length}) or "
                f"give more data."
            )
        self.train_stream = _stream("train", self.train_examples)
        self.held_out_stream = _stream("held_out", self.held_out_examples)
        check_lengths(model, self.train_stream.lengths, self.held_out_stream.lengths)
        self._known = _stream("known", self._paragraphs())
        self.images = TaskImages.of(inputs, self.train_examples, self.held_out_examples, packing=config.packing)

    @abstractmethod
    def encode(self, records: Sequence[Any]) -> tuple[list[TextExample], Counter[str]]:
        """Examples of records, and counts of what was cut and skipped, by the ends of their names ("_truncated")."""

    def _encode(self, records: Sequence[Any], part: str) -> list[TextExample]:
        """The examples of a part, with their images as far as these are wanted; what became of them is counted."""
        examples, counts = self.encode(records)
        self._counts |= {f"{part}{kind}": count for kind, count in counts.items()}
        if not any(example.images for example in examples):
            return examples
        if not getattr(self.config, "images", True):
            self._counts[f"{part}_images_left_out"] = sum(bool(example.images) for example in examples)
            return [replace(example, images=()) for example in examples]
        self._counts[f"{part}_with_image"] = sum(bool(example.images) for example in examples)
        return [replace(example, digests=self._digests(example.images)) for example in examples]

    def _paragraphs(self) -> list[TextExample]:
        """The paragraphs of ``known_texts``, cut to ``max_length``; every token but BOS carries loss."""
        if self.config.known_texts is None:
            return []
        text = read_text(local_path(self.config.known_texts))
        paragraphs = [paragraph.strip() for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
        encoded = [self.encode_prompt(self.tokenizer, text)[: self.config.max_length] for text in paragraphs]
        examples = [
            TextExample(ids=ids, answers=((1, len(ids)),), instruction="", prompt="", response="")
            for ids in encoded
            if len(ids) > 1
        ]
        if not examples:
            raise DataError(f"{self.config.known_texts} holds no paragraph of two tokens. Leave task.known_texts out.")
        self._counts |= {"known_paragraphs": len(examples), "known_skipped_short": len(encoded) - len(examples)}
        return examples

    @torch.no_grad()
    def known_loss(self) -> dict[str, float]:
        """The loss per token on ``known_texts``, as "known_loss"; nothing where there are none."""
        if not len(self._known):
            return {}
        self.eval()
        device, total = next(self.model.parameters()).device, 0.0
        for index in range(len(self._known)):
            batch = self.collate(self._known, [index])
            total += self({name: tensor.to(device) for name, tensor in batch.items()}).item()
        return {"known_loss": total / sum(self._known.counts)}

    # --- the loss ---

    def collate(self, stream: Stream, indices: Sequence[int]) -> Batch:
        """Right-padded ``input_ids`` (B, T), one example per sequence or several; ``supervised`` (N,), where in the
        flattened batch a label follows, and the ``targets`` (N,) there. Where a sequence holds several examples, also
        ``position_ids`` (B, T). Where examples have images, their features; see `TaskImages.batch`.

        There is no attention mask: under a causal mask no real token sees the padding behind it.
        """
        chosen: list[TextExample] = [stream.examples[index] for index in indices]
        sequences = [[example] for example in chosen]
        if self.config.packing:
            packed = pack_sequences([len(example.ids) for example in chosen], self._capacity)
            sequences = [[chosen[index] for index in indices] for indices in packed]
        longest = max(sum(len(example.ids) for example in sequence) for sequence in sequences)
        ids = torch.full((len(sequences), longest), self.tokenizer.eos_token_id, dtype=torch.long)
        positions = torch.arange(longest).repeat(len(sequences), 1)
        follows = torch.zeros((len(sequences), longest), dtype=torch.bool)
        for number, sequence in enumerate(sequences):
            start = 0
            for example in sequence:
                end = start + len(example.ids)
                ids[number, start:end] = torch.tensor(example.ids)
                positions[number, start:] = torch.arange(longest - start)
                for first, last in example.answers:
                    follows[number, start + first - 1 : start + last - 1] = True
                start = end
        supervised = follows.flatten().nonzero().squeeze(1)
        batch = {"input_ids": ids, "supervised": supervised, "targets": ids.flatten()[supervised + 1]}
        if len(sequences) < len(chosen):
            batch["position_ids"] = positions
        if self._split is None:
            batch["columns"] = follows.any(dim=0).nonzero().squeeze(1)
        return batch if self.images is None else batch | self.images.batch(chosen)

    def forward(self, batch: Batch) -> Tensor:
        """Summed cross-entropy of the answers' tokens. Logits are made only where a label exists."""
        if self.images is None:
            return self._loss(batch)
        with self.images.given(batch):
            return self._loss(batch)

    def _loss(self, batch: Batch) -> Tensor:
        ids, supervised, targets = batch["input_ids"], batch["supervised"], batch["targets"]
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if "position_ids" in batch:
            inputs["position_ids"] = batch["position_ids"]
        if self._split is not None:
            backbone, head = self._split
            hidden = backbone(**inputs).last_hidden_state.flatten(0, 1)[supervised]
            return chunked_cross_entropy(hidden, head.weight, head.bias, targets)
        columns, length = batch["columns"], ids.shape[1]  # those where any sequence is supervised
        if self._keeps_logits:
            logits = self.model(**inputs, logits_to_keep=columns).logits
        else:
            logits = self.model(**inputs).logits[:, columns]
        column = torch.searchsorted(columns, supervised % length)
        log_likelihood = logits[supervised // length, column].float().log_softmax(dim=-1)
        return -log_likelihood.gather(1, targets[:, None]).sum()  # rounded as the chunked loss is

    # --- answers ---

    @torch.no_grad()
    def evaluate(self, accelerator: Accelerator, *, limit: int | None = None) -> Evaluation:
        """Greedy answers to held-out examples, scored."""
        self.eval()
        limit = self.config.evaluation_limit if limit is None else limit
        chosen = self.asked()[:limit]
        if not chosen:
            return Evaluation(metrics=self.known_loss())
        predictions = [""] * len(chosen)
        lengths = [example.prompt_length for example in chosen]
        alike = by_room(self.model, lengths, self.config.max_new_tokens)  # the same on every process
        for places in alike.values():
            examples = [chosen[place] for place in places]
            found = map_over_ranks(accelerator, len(examples), partial(self._answer_some, examples))
            for place, text in zip(places, found, strict=True):
                predictions[place] = text
        evaluation = self.score(chosen, predictions)
        evaluation.metrics |= self.known_loss()
        evaluation.counts = {"answered": len(chosen), **evaluation.counts}
        evaluation.samples = [self._sample(e, t) for e, t in zip(chosen[:SHOWN], predictions, strict=False)]
        return evaluation

    def asked(self) -> Sequence[TextExample]:
        """The held-out examples that are answered in words, in order."""
        return self.held_out_examples

    @abstractmethod
    def score(self, examples: Sequence[TextExample], predictions: Sequence[str]) -> Evaluation:
        """What answers are worth.

        Args:
            examples: that were asked.
            predictions: the model's answers to them.
        """

    def _sample(self, example: TextExample, output: str) -> dict[str, str]:
        texts = {"instruction": example.instruction, "prompt": example.prompt, "expected": example.response}
        image = {} if self.images is None else self.images.thumbnail(example)
        return {**texts, **image, "output": output}

    def _answer_some(self, examples: Sequence[TextExample], indices: Sequence[int]) -> list[str]:
        chosen = [examples[index] for index in indices]
        return self._answers([example.ids[: example.prompt_length] for example in chosen], chosen)

    def answer(self, prompts: Sequence[str], *, batch_size: int = 32) -> list[str]:
        """Greedy continuations of texts, neighbours in length together, left-padded.

        Args:
            prompts: as text, template included.
            batch_size: prompts per forward pass.
        """
        return self._answers([self.encode_prompt(self.tokenizer, text) for text in prompts], batch_size=batch_size)

    @torch.no_grad()
    def _answers(
        self, encoded: Sequence[list[int]], examples: Sequence[TextExample] | None = None, *, batch_size: int = 32
    ) -> list[str]:
        """Continuations of encoded prompts; with the images of the examples that they belong to."""

        def answer(chosen: list[int], count: int) -> list[str]:
            prompts = [encoded[index] for index in chosen]
            if self.images is None or examples is None:
                return self._continue(prompts, count)
            with self.images.given(self.images.batch([examples[index] for index in chosen])):
                return self._continue(prompts, count)

        return answer_in_batches(self.model, encoded, self.config.max_new_tokens, answer, batch_size=batch_size)

    def _continue(self, encoded: Sequence[Sequence[int]], count: int) -> list[str]:
        """Greedy continuations of one batch, each of at most ``count`` tokens."""
        stop_tokens, stop_strings = self.stop_tokens, self.stop_strings
        return continue_texts(
            self.model, self.tokenizer, encoded, count, stop_tokens=stop_tokens, stop_strings=stop_strings
        )

    @property
    def stop_tokens(self) -> list[int]:
        """Each of them ends an answer; the first pads."""
        return [self.tokenizer.eos_token_id]

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Texts that end an answer too, and are no part of it."""
        return ()

    # --- what a run keeps ---

    def data_report(self) -> dict[str, Any]:
        """Counts of records read, kept, truncated and skipped."""
        return dict(self._counts)

    def image_sources(self) -> Mapping[bytes, ImageSource]:
        return {} if self.images is None else self.images.sources

    def controls(self) -> dict[str, Callable[[], AbstractContextManager[None]]]:
        """With images: "shuffled", every example with another one's."""
        return {} if self.images is None else {"shuffled": self.images.shuffled}

    def fingerprint(self) -> str:
        """Over the token ids of both parts, and the content of their images."""
        digest = hashlib.sha256()
        for example in (*self.train_examples, *self.held_out_examples):
            single = example.answers == ((example.prompt_length, len(example.ids)),)  # as zinit 0.1 wrote it
            digest.update(repr((example.ids, example.prompt_length if single else example.answers)).encode())
            digest.update(b"".join(example.digests))
        return digest.hexdigest()


def _capacity(model: nn.Module, config: TextConfig) -> int | None:
    """Tokens that a sequence of several examples may hold; None where one sequence takes all examples."""
    if supports_packing(model, sequences=2):
        return config.max_length
    if supports_packing(model, sequences=1):  # flash attention splits a batch of one sequence
        return None
    raise ConfigError(
        f"{type(model).__name__} cannot take several examples in one sequence: in a trial one saw another "
        f"(attention implementation {attention_implementation(getattr(model, 'config', None))!r}). "
        f"Leave packing off: -o task.packing=false."
    )


def _stream(name: str, examples: list[TextExample]) -> Stream:
    return Stream(
        name=name,
        examples=examples,
        lengths=[len(example.ids) for example in examples],
        counts=[example.supervised for example in examples],
    )
