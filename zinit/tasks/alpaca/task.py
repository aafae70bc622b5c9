"""Instruction tuning in Alpaca's format (paper, section 4.1): two templates, loss on the response only."""

from __future__ import annotations

import hashlib
import inspect
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zinit.compat import attention_implementation
from zinit.data.packing import pack_sequences, supports_packing
from zinit.distributed import map_over_ranks
from zinit.errors import ConfigError, DataError
from zinit.metrics import METRICS
from zinit.models.losses import chunked_cross_entropy, split_head
from zinit.models.room import check_lengths, check_positions, positions
from zinit.tasks.alpaca.config import AlpacaConfig
from zinit.tasks.alpaca.examples import Example, Record, encode_records, split_records
from zinit.tasks.alpaca.template import format_conversation, format_prompt
from zinit.tasks.base import Batch, DataInputs, Evaluation, Stream, Task, TaskInputs

if TYPE_CHECKING:
    from accelerate import Accelerator

IGNORED = -100


class Alpaca(Task):
    """See the module. Needs a causal language model of transformers and its tokenizer."""

    name = "alpaca"
    Config = AlpacaConfig
    loader = "zinit.models.loading:load_causal_lm"
    metric = "exact_match"
    generates = True
    reads_several = True

    def __init__(self, inputs: TaskInputs, config: AlpacaConfig) -> None:
        super().__init__(inputs, config)
        model, tokenizer = inputs.model, inputs.processor
        self.tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"{type(tokenizer).__name__} has no end-of-sequence token, which ends a response.")
        check_positions(model, config.max_length)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._split = split_head(model)  # a tuple, so that nothing is registered twice
        self._capacity = _capacity(model, config) if config.packing else None
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

    @classmethod
    def read_data(cls, inputs: DataInputs, config: AlpacaConfig) -> tuple[list[Record], list[Record], dict[str, int]]:
        """See `split_records`."""
        return split_records(
            inputs.sources,
            config.held_out_data,
            fields=config.fields,
            held_out=config.held_out,
            seed=inputs.seed,
            train=inputs.train,
        )

    def _encode(self, records: list[Record], part: str) -> list[Example]:
        examples, counts = encode_records(self.tokenizer, records, max_length=self.config.max_length)
        self._counts |= {f"{part}{kind}": count for kind, count in counts.items()}
        return examples

    @classmethod
    def format_prompt(cls, instruction: str, input: str = "") -> str:
        return format_prompt(instruction, input)

    @classmethod
    def format_conversation(cls, turns: Sequence[tuple[str, str]], instruction: str) -> str:
        return format_conversation(turns, instruction)

    def collate(self, stream: Stream, indices: Sequence[int]) -> Batch:
        """Right-padded ``input_ids`` (B, T), one example per sequence or several; ``supervised`` (N,), where in the
        flattened batch a label follows, and the ``targets`` (N,) there. Where a sequence holds several examples, also
        ``position_ids`` (B, T).

        There is no attention mask: under a causal mask no real token sees the padding behind it.
        """
        chosen: list[Example] = [stream.examples[index] for index in indices]
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
                follows[number, start + example.prompt_length - 1 : end - 1] = True
                start = end
        supervised = follows.flatten().nonzero().squeeze(1)
        batch = {"input_ids": ids, "supervised": supervised, "targets": ids.flatten()[supervised + 1]}
        if len(sequences) < len(chosen):
            batch["position_ids"] = positions
        if self._split is None:
            batch["columns"] = follows.any(dim=0).nonzero().squeeze(1)
        return batch

    def forward(self, batch: Batch) -> Tensor:
        """Summed cross-entropy of the response tokens, EOS included. Logits are made only where a label exists."""
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

    @torch.no_grad()
    def evaluate(self, accelerator: Accelerator, *, limit: int | None = None) -> Evaluation:
        """Greedy answers to held-out instructions: exact match and ROUGE-L."""
        self.eval()
        limit = self.config.evaluation_limit if limit is None else limit
        chosen = self.held_out_examples[:limit]
        if not chosen:
            return Evaluation(metrics={})
        predictions = [""] * len(chosen)
        alike = self._by_room([example.prompt_length for example in chosen])  # the same on every process
        for places in alike.values():
            prompts = [chosen[place].prompt for place in places]
            found = map_over_ranks(accelerator, len(prompts), partial(self._answer_some, prompts))
            for place, text in zip(places, found, strict=True):
                predictions[place] = text
        references = [example.response.strip() for example in chosen]
        metrics: dict[str, float] = {}
        for name in ("exact_match", "rouge_l"):
            metrics |= METRICS.get(name)().compute(predictions=predictions, references=references)
        samples = [
            {
                "instruction": example.instruction,
                "prompt": example.prompt,
                "expected": example.response,
                "output": predictions[index],
            }
            for index, example in enumerate(chosen[:8])
        ]
        return Evaluation(metrics=metrics, counts={"answered": len(chosen)}, samples=samples)

    def _answer_some(self, prompts: Sequence[str], indices: Sequence[int]) -> list[str]:
        return self.answer([prompts[index] for index in indices])

    @torch.no_grad()
    def answer(self, prompts: Sequence[str], *, batch_size: int = 32) -> list[str]:
        """Greedy continuations, neighbours in length together, left-padded.

        Args:
            prompts: as text, template included.
            batch_size: prompts per forward pass.
        """
        encoded = [self.encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda index: -len(encoded[index]))
        answers = [""] * len(prompts)
        for count, alike in self._by_room([len(encoded[index]) for index in order]).items():
            for start in range(0, len(alike), batch_size):
                chosen = [order[place] for place in alike[start : start + batch_size]]
                texts = self._continue([encoded[index] for index in chosen], count)
                for index, text in zip(chosen, texts, strict=True):
                    answers[index] = text.strip()
        return answers

    def _by_room(self, lengths: Sequence[int]) -> dict[int, list[int]]:
        """{tokens of the longest answer: places of the prompts with room for it}: no answer ends by another's room.

        Args:
            lengths: of the prompts, in tokens.

        Raises:
            ConfigError: if a prompt leaves no room at all.
        """
        room, most = positions(self.model), self.config.max_new_tokens
        if room is not None and max(lengths, default=0) >= room:
            raise ConfigError(
                f"a prompt has {max(lengths)} tokens, but the model has room for {room}, answer included."
            )
        found: dict[int, list[int]] = defaultdict(list)
        for place, length in enumerate(lengths):
            found[most if room is None else min(most, room - length)].append(place)
        return found

    def _continue(self, encoded: Sequence[Sequence[int]], count: int) -> list[str]:
        """Greedy continuations of one batch, each of at most ``count`` tokens."""
        from zinit.models.generation import greedy

        device, eos = next(self.model.parameters()).device, self.tokenizer.eos_token_id
        longest = max(map(len, encoded))
        ids = torch.full((len(encoded), longest), eos, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, own in enumerate(encoded):
            ids[place, longest - len(own) :] = torch.tensor(own)
            mask[place, longest - len(own) :] = 1
        generated = self.model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=greedy(max_new_tokens=count, eos_token_id=eos),
        )
        return self.tokenizer.batch_decode(generated[:, longest:], skip_special_tokens=True)

    def data_report(self) -> dict[str, Any]:
        """Counts of records read, kept, truncated and skipped."""
        return dict(self._counts)

    def fingerprint(self) -> str:
        """Over the token ids of both parts."""
        digest = hashlib.sha256()
        for example in (*self.train_examples, *self.held_out_examples):
            digest.update(repr((example.ids, example.prompt_length)).encode())
        return digest.hexdigest()


def _capacity(model: nn.Module, config: AlpacaConfig) -> int | None:
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


def _stream(name: str, examples: list[Example]) -> Stream:
    return Stream(
        name=name,
        examples=examples,
        lengths=[len(example.ids) for example in examples],
        counts=[len(example.ids) - example.prompt_length for example in examples],
    )
