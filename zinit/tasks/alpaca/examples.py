"""Alpaca's records: read, divided into training and held-out ones, encoded."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from zinit.data.hold_out import hold_out
from zinit.data.records import count_sources, most_unused, read_records, same_text
from zinit.demo import instructions
from zinit.tasks.alpaca.template import encode_pairs, format_prompt
from zinit.tasks.text import TextExample

Record = dict[str, str]
COUNTED: tuple[str, ...] = ("", "_truncated", "_empty_response", "_skipped_prompt_too_long")


def encode_records(
    tokenizer: Any,
    records: Sequence[Record],
    *,
    max_length: int,
    format_prompt: Callable[[str, str], str] = format_prompt,
) -> tuple[list[TextExample], Counter[str]]:
    """Encoded records; see `encode_pairs`.

    Args:
        tokenizer: of the model.
        records: with ``instruction``, ``input`` and ``output``.
        max_length: tokens of an example; a longer one is cut, one of which no response is left then is skipped.
        format_prompt: makes the prompt of an instruction and its input.

    Returns:
        The examples, and counts under the names of `COUNTED`, and of what was skipped beside.
    """
    prompts = [format_prompt(record["instruction"], record["input"]) for record in records]
    encoded = encode_pairs(tokenizer, [(p, record["output"]) for p, record in zip(prompts, records, strict=True)])
    examples: list[TextExample] = []
    counts: Counter[str] = Counter(dict.fromkeys(COUNTED, 0))
    for record, prompt, (ids, prompt_length) in zip(records, prompts, encoded, strict=True):
        response = record["output"]
        if not record["instruction"].strip():
            counts["_skipped_blank_instruction"] += 1
            continue
        if prompt_length >= max_length:
            counts["_skipped_prompt_too_long"] += 1
            continue
        if len(ids) > max_length and _is_blank(tokenizer, ids[prompt_length:max_length]) and response.strip():
            counts["_skipped_response_cut_to_blanks"] += 1
            continue
        counts["_truncated"] += len(ids) > max_length
        counts["_empty_response"] += not response.strip()
        asked = "\n\n".join(filter(None, (record["instruction"], record["input"])))
        ids = ids[:max_length]
        answers = ((prompt_length, len(ids)),)
        examples.append(TextExample(ids=ids, answers=answers, instruction=asked, prompt=prompt, response=response))
    counts[""] = len(examples)
    return examples, counts


def _is_blank(tokenizer: Any, ids: list[int]) -> bool:
    """Whether tokens stand for nothing but white space, which at the edges of a field is no content."""
    return not tokenizer.decode(ids, skip_special_tokens=True).strip()


def split_records(
    sources: Sequence[str],
    held_out_data: str | None,
    *,
    fields: Sequence[str],
    held_out: int,
    seed: int,
    train: bool,
    held_out_fields: Sequence[str] | None = None,
    renamed_by: str = "task.fields=INSTRUCTION,INPUT,OUTPUT (or INSTRUCTION,OUTPUT)",
) -> tuple[list[Record], list[Record], dict[str, int]]:
    """Training and held-out records: no (instruction, input) is in both.

    Args:
        sources: of the records, in order; none is the embedded demo's.
        held_out_data: a source of held-out records; None takes them from ``sources``.
        fields: what the source calls instruction, input and output; or instruction and output alone.
        held_out: most records to take from ``sources``.
        seed: of the choice of held-out records, where the data is one file.
        train: False leaves training records out.
        held_out_fields: as ``fields``, in ``held_out_data``; None is the same.
        renamed_by: the option that names the fields otherwise, for messages.

    Returns:
        Both parts, with ``instruction``, ``input`` and ``output``, and counts for the task's report.
    """
    unused: Counter[str] = Counter()

    def read(source: str, fields: Sequence[str]) -> list[Record]:
        instruction, *input, output = fields
        found = read_records(
            source,
            required=(instruction, output),
            optional=input,
            renamed_by=renamed_by,
            unused=unused,
        )
        own = [("instruction", instruction), *(("input", name) for name in input), ("output", output)]
        return [{"input": "", **{name: record[given] for name, given in own}} for record in found]

    by_source: list[list[Record]] = []
    if sources and (train or held_out_data is None):
        by_source = [read(source, fields) for source in sources]
    every = list(itertools.chain.from_iterable(by_source))
    if held_out_data is not None:
        evaluated, training = read(held_out_data, held_out_fields or fields), []
        if train:
            training = every if sources else instructions()[0]
    elif not sources:
        training, evaluated = instructions()
    else:
        training, evaluated = hold_out(every, held_out, seed, ", ".join(sources), "record")
    counts = {"read": len(training) + len(evaluated), **count_sources(by_source), **most_unused(unused)}
    counts |= {f"{part}{kind}": 0 for part in ("train", "held_out") for kind in COUNTED}
    asked = {same_text(record["instruction"], record["input"]) for record in evaluated}
    clean = [record for record in training if same_text(record["instruction"], record["input"]) not in asked]
    counts["train_skipped_also_held_out"] = len(training) - len(clean)
    return clean, evaluated, counts
