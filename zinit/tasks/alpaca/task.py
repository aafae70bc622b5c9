"""Instruction tuning in Alpaca's format (paper, section 4.1): two templates, loss on the response only."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zinit.compat import attention_implementation
from zinit.config import JsonConfig
from zinit.data.packing import keeps_examples_apart, lay_rows
from zinit.data.records import read_records
from zinit.demo import instructions
from zinit.distributed import map_over_ranks
from zinit.errors import ConfigError, DataError
from zinit.metrics import METRICS
from zinit.models.losses import chunked_cross_entropy, split_head
from zinit.tasks.base import Batch, Evaluation, Stream, Task, TaskInputs

if TYPE_CHECKING:
    from accelerate import Accelerator

IGNORED = -100
HEADER = "Below is an instruction that describes a task"
REQUEST = "Write a response that appropriately completes the request."


def format_prompt(instruction: str, input: str = "") -> str:
    """Alpaca's prompt: the template with an input section if there is an input, else the one without.

    Args:
        instruction: what to do.
        input: further context; may be empty.
    """
    if input:
        return (
            f"{HEADER}, paired with an input that provides further context. {REQUEST}\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
        )
    return f"{HEADER}. {REQUEST}\n\n### Instruction:\n{instruction}\n\n### Response:"


def format_conversation(turns: Sequence[tuple[str, str]], instruction: str) -> str:
    """A prompt that holds the earlier turns of a chat, each as an instruction with its response.

    Args:
        turns: (instruction, response) pairs so far.
        instruction: the one to answer now.
    """
    sections = [f"### Instruction:\n{asked}\n\n### Response:{answered}" for asked, answered in turns]
    return "\n\n".join([f"{HEADER}. {REQUEST}", *sections, f"### Instruction:\n{instruction}\n\n### Response:"])


def encode_texts(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids without BOS and EOS. A "</s>" that somebody wrote in a text stays text."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] if texts else []


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """The tokens a generation starts from: BOS (if the model has one) + prompt."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + encode_texts(tokenizer, [prompt])[0]


@dataclass(frozen=True, kw_only=True)
class AlpacaConfig(JsonConfig):
    """What the task does with its data.

    Args:
        max_length: tokens per example, BOS and EOS included; longer ones are cut at the end. Reference code: 512.
        held_out: examples kept from training for evaluation, at most a tenth of the data. (The reference evaluates
            on training examples.)
        held_out_data: a source of its own for the held-out examples instead.
        fields: what the data calls instruction, input and output.
        evaluation_limit: held-out examples that an answer is generated for.
        max_new_tokens: longest generated answer.
        packing: lay the short examples of a micro-batch together into rows of at most ``max_length`` tokens. Pays
            where micro-batches are large; on a CPU, 8 examples of like length at a time, its masks cost what it saves.
    """

    max_length: int = 512
    held_out: int = 200
    held_out_data: str | None = None
    fields: tuple[str, ...] = ("instruction", "input", "output")
    evaluation_limit: int = 200
    max_new_tokens: int = 128
    packing: bool = False

    def __post_init__(self) -> None:
        for name, least in (("max_length", 8), ("held_out", 1), ("evaluation_limit", 0), ("max_new_tokens", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be a whole number of at least {least}; got {value!r}.")
        if len(self.fields) != 3 or not all(isinstance(field, str) and field for field in self.fields):
            raise ConfigError(f"fields must name instruction, input and output; got {self.fields!r}.")
        if not isinstance(self.packing, bool):
            raise ConfigError(f"packing must be true or false; got {self.packing!r}.")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One encoded record.

    Attributes:
        ids: BOS, prompt, response, EOS (cut at max_length).
        prompt_length: how many of the first ids carry no loss.
        prompt: as text.
        response: as text.
    """

    ids: list[int]
    prompt_length: int
    prompt: str
    response: str


class Alpaca(Task):
    """See the module. Needs a causal language model of transformers and its tokenizer."""

    name = "alpaca"
    Config = AlpacaConfig
    loader = "zinit.models.loading:load_causal_lm"
    metric = "exact_match"
    generates = True

    def __init__(self, inputs: TaskInputs, config: AlpacaConfig) -> None:
        super().__init__(inputs, config)
        model, tokenizer = inputs.model, inputs.processor
        self.tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"{type(tokenizer).__name__} has no end-of-sequence token, which ends a response.")
        room = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        if room is not None and config.max_length > room:
            raise ConfigError(
                f"task.max_length is {config.max_length}, but the model has room for {room} tokens: "
                f"-o task.max_length={room}."
            )
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._split = split_head(model)  # a tuple, so that nothing is registered twice
        self._row_length = _row_length(model, config) if config.packing else None
        training, held_out, self._counts = _split(config, inputs.data, inputs.seed, train=inputs.train)
        self.train_examples = self._encode(training, "train")
        self.held_out_examples = self._encode(held_out, "held_out")
        if not self.held_out_examples:
            raise DataError(
                f"nothing is left to evaluate on: {self._counts}. Raise task.max_length (now {config.max_length}) or "
                f"give more data."
            )
        self.train_stream = _stream("train", self.train_examples)
        self.held_out_stream = _stream("held_out", self.held_out_examples)

    def _encode(self, records: list[dict[str, str]], part: str) -> list[Example]:
        """Token ids as the reference makes them: BOS + prompt and response encoded as one text + EOS.

        Where a tokenizer would merge across the border the response is encoded by itself, so that a prompt is always
        the same tokens in training and in generation.
        """
        instruction, input, output = self.config.fields
        prompts = [format_prompt(record[instruction], record[input]) for record in records]
        responses = [record[output] for record in records]
        encoded = self._encode_texts([*prompts, *(p + r for p, r in zip(prompts, responses, strict=True))])
        bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        examples = []
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            start, whole = encoded[i], encoded[len(records) + i]
            if whole[: len(start)] != start:
                whole = start + self._encode_texts([response])[0]
            ids = [*bos, *whole, self.tokenizer.eos_token_id]
            prompt_length = len(bos) + len(start)
            if prompt_length >= self.config.max_length:
                self._counts[f"{part}_skipped_prompt_too_long"] += 1
                continue
            self._counts[f"{part}_truncated"] += len(ids) > self.config.max_length
            self._counts[f"{part}_empty_response"] += not response.strip()
            ids = ids[: self.config.max_length]
            examples.append(Example(ids=ids, prompt_length=prompt_length, prompt=prompt, response=response))
        self._counts[part] = len(examples)
        return examples

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        return encode_texts(self.tokenizer, texts)

    def collate(self, stream: Stream, indices: Sequence[int]) -> Batch:
        """Right-padded ``input_ids`` (B, T), an example per row or several; ``supervised`` (N,), where in the flattened
        batch a label follows, and the ``targets`` (N,) there. Where a row holds several, also ``position_ids`` (B, T).

        There is no attention mask: under a causal mask no real token sees the padding behind it.
        """
        examples = self.train_examples if stream is self.train_stream else self.held_out_examples
        chosen = [examples[index] for index in indices]
        rows = [[example] for example in chosen]
        if self.config.packing:
            rows = [[chosen[i] for i in row] for row in lay_rows([len(e.ids) for e in chosen], self._row_length)]
        longest = max(sum(len(example.ids) for example in row) for row in rows)
        ids = torch.full((len(rows), longest), self.tokenizer.eos_token_id, dtype=torch.long)
        positions = torch.arange(longest).repeat(len(rows), 1)
        follows = torch.zeros((len(rows), longest), dtype=torch.bool)
        for number, row in enumerate(rows):
            start = 0
            for example in row:
                end = start + len(example.ids)
                ids[number, start:end] = torch.tensor(example.ids)
                positions[number, start:] = torch.arange(longest - start)
                follows[number, start + example.prompt_length - 1 : end - 1] = True
                start = end
        supervised = follows.flatten().nonzero().squeeze(1)
        batch = {"input_ids": ids, "supervised": supervised, "targets": ids.flatten()[supervised + 1]}
        if len(rows) < len(chosen):
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
            trunk, head = self._split
            hidden = trunk(**inputs).last_hidden_state.flatten(0, 1)[supervised]
            return chunked_cross_entropy(hidden, head.weight, head.bias, targets)
        columns, length = batch["columns"], ids.shape[1]  # those that any row is supervised in
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
        predictions = map_over_ranks(
            accelerator, len(chosen), lambda indices: self.answer([chosen[index].prompt for index in indices])
        )
        references = [example.response.strip() for example in chosen]
        metrics: dict[str, float] = {}
        for name in ("exact_match", "rouge_l"):
            metrics |= METRICS.get(name)().compute(predictions=predictions, references=references)
        samples = [
            {"prompt": example.prompt, "expected": example.response, "output": predictions[index]}
            for index, example in enumerate(chosen[:8])
        ]
        return Evaluation(metrics=metrics, counts={"answered": len(chosen)}, samples=samples)

    @torch.no_grad()
    def answer(self, prompts: Sequence[str], *, batch_size: int = 32) -> list[str]:
        """Greedy continuations, neighbours in length together, left-padded.

        Args:
            prompts: as text, template included.
            batch_size: prompts per forward pass.
        """
        device = next(self.model.parameters()).device
        encoded = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda index: -len(encoded[index]))
        answers = [""] * len(prompts)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            longest = max(len(encoded[index]) for index in chosen)
            ids = torch.full((len(chosen), longest), self.tokenizer.eos_token_id, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(chosen):
                ids[row, longest - len(encoded[index]) :] = torch.tensor(encoded[index])
                mask[row, longest - len(encoded[index]) :] = 1
            generated = self.model.generate(  # pyright: ignore[reportCallIssue]
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=self.config.max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                num_beams=1,
                repetition_penalty=1.0,
                pad_token_id=self.tokenizer.eos_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
            )
            texts = self.tokenizer.batch_decode(generated[:, longest:], skip_special_tokens=True)
            for index, text in zip(chosen, texts, strict=True):
                answers[index] = text.strip()
        return answers

    def data_report(self) -> dict[str, Any]:
        """Counts of records read, kept, truncated and skipped."""
        return dict(self._counts)

    def fingerprint(self) -> str:
        """Over the token ids of both parts."""
        digest = hashlib.sha256()
        for example in (*self.train_examples, *self.held_out_examples):
            digest.update(repr((example.ids, example.prompt_length)).encode())
        return digest.hexdigest()


def _row_length(model: nn.Module, config: AlpacaConfig) -> int | None:
    """Tokens that a row of several examples may hold; None where there is one row for all."""
    if keeps_examples_apart(model, rows=2):
        return config.max_length
    if keeps_examples_apart(model, rows=1):  # flash attention splits a batch of one row
        return None
    raise ConfigError(
        f"{type(model).__name__} cannot take several examples in one row: in a trial they were not kept apart "
        f"(attention implementation {attention_implementation(getattr(model, 'config', None))!r}). "
        f"Leave packing off: -o task.packing=false."
    )


def _stream(name: str, examples: list[Example]) -> Stream:
    return Stream(
        name=name,
        lengths=[len(example.ids) for example in examples],
        counts=[len(example.ids) - example.prompt_length for example in examples],
    )


def _split(
    config: AlpacaConfig, data: str | None, seed: int, *, train: bool
) -> tuple[list[dict[str, str]], list[dict[str, str]], dict[str, int]]:
    """Training and held-out records: no (instruction, input) is in both."""
    instruction, input, output = config.fields

    def read(source: str) -> list[dict[str, str]]:
        return read_records(
            source,
            required=(instruction, output),
            optional=(input,),
            renamed_by="task.fields=INSTRUCTION,INPUT,OUTPUT",
        )

    if config.held_out_data is not None:
        held_out, training = read(config.held_out_data), []
        if train:
            training = read(data) if data is not None else instructions()[0]
    elif data is None:
        training, held_out = instructions()
    else:
        records = read(data)
        if len(records) < 2:
            raise DataError(f"{data} holds {len(records)} record; at least 2 are needed, one of them held out.")
        count = min(config.held_out, max(1, len(records) // 10))
        order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
        kept = set(order[:count])
        held_out = [records[index] for index in order[:count]]
        training = [record for index, record in enumerate(records) if index not in kept]
    parts = ("train", "held_out")
    kinds = ("", "_truncated", "_empty_response", "_skipped_prompt_too_long")
    counts = {"read": len(training) + len(held_out)} | {f"{part}{kind}": 0 for part in parts for kind in kinds}
    asked = {(record[instruction], record[input]) for record in held_out}
    clean = [record for record in training if (record[instruction], record[input]) not in asked]
    counts["train_skipped_also_held_out"] = len(training) - len(clean)
    return clean, held_out, counts
