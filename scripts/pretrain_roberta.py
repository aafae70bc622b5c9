"""Pretrain the demo's masked language model: ``python -m scripts.pretrain_roberta --output DIR``.

It trains a byte-level BPE tokenizer and a tiny RoBERTa from scratch, and writes them in transformers' format. The files
in ``zinit/demo/roberta`` were made by this script with its defaults. It is seeded and computes in one thread: the same
processor and library versions give the same files, however many cores there are.

The model fills gaps in texts of :mod:`zinit.demo.world`, in worlds whose facts are redrawn all the time, so that
nothing can be memorized. Most documents are pairs of a passage and questions on it *with their answers*:
what is masked on one side can be read on the other. Questions without an answer, the task's format, do not occur.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import processors
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

from scripts.pretraining import command, console, fit, seed_everything, train_bpe
from zinit.demo import world
from zinit.demo.questions import ask, choose_subjects, passage, tell
from zinit.demo.questions import documents as squad
from zinit.demo.world import Fact, World

VOCABULARY = 2048  # at most; the texts may not hold enough frequent pairs
CONTEXT = 256
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # ids 0 to 4; RoBERTa has its mask at the end
UNKNOWN = "unknown"
"""The answer to a question whose answer the passage does not state."""

Document = tuple[str, str | None]
"""One text, or a pair."""


# --- documents -----------------------------------------------------------------------------------------------------


def documents(here: World, seed: int) -> Iterator[Document]:
    """An endless stream: one plain text in ten, else a passage paired with questions and answers."""
    rng = Random(f"roberta {seed}")
    while True:
        if rng.random() < 1 / 10:
            yield next(world.texts(_redraw(here, rng), rng.randrange(2**32))), None
        else:
            yield _pair(here, rng)


def _redraw(here: World, rng: Random) -> World:
    facts = {
        subject: tuple(Fact(subject, fact.relation, rng.choice(fact.relation.values)) for fact in facts)
        for subject, facts in here.facts.items()
    }
    return World(here.people, here.towns, facts)


def _pair(here: World, rng: Random) -> Document:
    subjects = choose_subjects(here.people, here.towns, rng)
    told, untold = passage(here, rng, subjects)
    if rng.random() < 0.5:
        told, untold = told[: rng.randint(2, 4)], []
    text, _ = tell(told, rng)
    form = rng.choice(world.TALK + world.QUIZ)
    asked = [(fact, fact.object) for fact in rng.sample(told, min(len(told), rng.randint(2, 5)))]
    asked += [(fact, UNKNOWN) for fact in rng.sample(untold, min(len(untold), rng.randint(0, 2)))]
    rng.shuffle(asked)
    mark = form.a.rstrip() + " "  # a word is one token after a space and another one without
    exchange = "".join(form.q + ask(fact, rng) + mark + answer + form.end for fact, answer in asked)
    pair = (exchange.rstrip(), text)
    return pair if rng.random() < 0.7 else (pair[1], pair[0])


# --- tokens --------------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE that joins a pair as RoBERTa's does: ``<s> A </s></s> B </s>``. A text starts like a word."""
    tokenizer = train_bpe(texts, vocabulary=VOCABULARY, special=list(SPECIAL), space=True, least=50)
    tokenizer.post_processor = processors.RobertaProcessing(
        sep=("</s>", 2), cls_token=("<s>", 0), trim_offsets=True, add_prefix_space=True
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


class Masker:
    """Hides whole words and names, mostly those that occur twice, and never all occurrences of one."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, here: World, seed: int) -> None:
        self.tokenizer = tokenizer
        self.rng = Random(f"mask {seed}")
        values = {value for facts in here.facts.values() for fact in facts for value in fact.relation.values}
        self.values = values | {UNKNOWN}
        self.names = self.values | set(here.people + here.towns)
        names = sorted(self.names, key=lambda name: (-len(name), name))
        self.units = re.compile(rf"\b(?:{'|'.join(names)})\b|\w+|[^\w\s]")

    def __call__(self, documents: list[Document]) -> dict[str, Tensor]:
        """One batch: ``input_ids``, ``attention_mask`` and ``labels`` (-100 where nothing is hidden), each (B, T)."""
        sequences: list[tuple[list[int], list[int]]] = []
        for first, second in documents:
            encoding = self.tokenizer(first, second, truncation=True, max_length=CONTEXT, return_offsets_mapping=True)
            ids = list(encoding["input_ids"])
            labels = [-100] * len(ids)
            for tokens in self._hidden([first, second or ""], encoding.sequence_ids(), encoding["offset_mapping"]):
                roll = self.rng.random()
                for token in tokens:
                    labels[token] = ids[token]
                    if roll < 0.8:
                        ids[token] = self.tokenizer.mask_token_id
                    elif roll < 0.9:
                        ids[token] = self.rng.randrange(len(SPECIAL), len(self.tokenizer))
            sequences.append((ids, labels))
        length = max(len(ids) for ids, _ in sequences)
        pad: int = self.tokenizer.pad_token_id  # pyright: ignore[reportAssignmentType]
        ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in sequences])
        labels = torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in sequences])
        return {"input_ids": ids, "attention_mask": ids.ne(pad).long(), "labels": labels}

    def _hidden(
        self, segments: list[str], sides: list[int | None], offsets: list[tuple[int, int]]
    ) -> Iterator[list[int]]:
        """The tokens of each word to hide."""
        at: dict[tuple[int, int], list[int]] = defaultdict(list)
        for token, (side, (start, end)) in enumerate(zip(sides, offsets, strict=True)):
            if side is not None and start < end:
                at[side, start].append(token)
        places: dict[str, list[list[int]]] = defaultdict(list)
        for side, segment in enumerate(segments):
            for match in self.units.finditer(segment):
                if tokens := [t for i in range(*match.span()) for t in at[side, i]]:
                    places[match.group()].append(tokens)
        for name, occurrences in places.items():
            if name == UNKNOWN:
                fraction = 0.5
            elif name in self.values and len(occurrences) > 1:
                occurrences.pop(self.rng.randrange(len(occurrences)))
                fraction = 0.8
            else:
                fraction = 0.08 if name in self.names else 0.3
            yield from (tokens for tokens in occurrences if self.rng.random() < fraction)


def batches(stream: Iterator[Document], masker: Masker, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Masked batches of documents of similar length, in random order."""
    rng = Random(f"batches {seed}")
    while True:
        pool = sorted(islice(stream, 20 * size), key=lambda pair: len(pair[0]) + len(pair[1] or ""))
        starts = list(range(0, len(pool), size))
        rng.shuffle(starts)
        yield from (masker(pool[start : start + size]) for start in starts)


# --- the model -----------------------------------------------------------------------------------------------------


def make_model(tokenizer: PreTrainedTokenizerFast) -> RobertaForMaskedLM:
    """A RoBERTa in miniature. Its learned positions start as sinusoids, which makes neighbours easy to find."""
    model = RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=320,
            initializer_range=0.05,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT + 2,  # RoBERTa counts from the padding id + 1
            type_vocab_size=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            bos_token_id=0,
            pad_token_id=1,
            eos_token_id=2,
        )
    )
    roberta: Any = model.roberta
    weight = roberta.embeddings.position_embeddings.weight
    place = torch.arange(weight.shape[0])[:, None]
    angle = place / 1000 ** (torch.arange(weight.shape[1] // 2) / (weight.shape[1] // 2))
    weight.data.copy_(0.05 * math.sqrt(2) * torch.cat([angle.sin(), angle.cos()], dim=1))
    for layer in roberta.encoder.layer:
        attention = layer.attention
        nn.init.normal_(attention.self.query.weight, std=0.08)
        attention.self.key.weight.data.copy_(attention.self.query.weight)
    return model


def losses(model: RobertaForMaskedLM, batches: Iterator[dict[str, Tensor]]) -> Iterator[Tensor]:
    """The loss on the masked tokens, batch after batch."""
    for batch in batches:
        labels = batch.pop("labels")
        hidden = model.roberta(**batch).last_hidden_state[labels != -100]
        yield F.cross_entropy(model.lm_head(hidden), labels[labels != -100])


@torch.inference_mode()
def cloze_accuracy(model: RobertaForMaskedLM, tokenizer: PreTrainedTokenizerFast, document: dict[str, Any]) -> float:
    """The fraction of answerable questions whose masked answer the model reads off the context."""
    right: list[bool] = []
    for paragraph in (paragraph for article in document["data"] for paragraph in article["paragraphs"]):
        for question in paragraph["qas"]:
            for answer in question["answers"]:
                asked = tokenizer(f"Q: {question['question']}\nA:", add_special_tokens=False)["input_ids"]
                wanted = tokenizer(answer["text"], add_special_tokens=False)["input_ids"]
                context = tokenizer(paragraph["context"], add_special_tokens=False)["input_ids"]
                hidden = [tokenizer.mask_token_id] * len(wanted)
                ids = torch.tensor([[0, *asked, *hidden, 2, 2, *context, 2]])
                start = 1 + len(asked)
                best = model(input_ids=ids).logits[0, start : start + len(wanted)].argmax(-1)
                right.append(best.tolist() == wanted)
    return sum(right) / len(right)


def pretrain(output: Path, steps: int, batch_size: int, peak: float, seed: int) -> RobertaForMaskedLM:
    """Train tokenizer and model and write both to ``output``."""
    seed_everything(seed)
    here = world.build()
    tokenizer = train_tokenizer(
        text for document in islice(documents(here, seed), 4000) for text in document if text is not None
    )
    model = make_model(tokenizer)
    console.print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    masked = batches(documents(here, seed + 1), Masker(tokenizer, here, seed), batch_size, seed)
    # The cosine ends early, so the rate does not reach zero.
    fit(model, losses(model, masked), steps, peak, warmup=100, horizon=2.5 * steps, decay=0.01)
    model.half()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    model.float()
    accuracy = cloze_accuracy(model, tokenizer, squad(here)[1])
    console.print(f"cloze accuracy on paragraphs about held-out entities: {accuracy:.3f}")
    return model


if __name__ == "__main__":
    command(
        pretrain,
        "Pretrain the demo's masked language model on the invented world.",
        steps=5000,
        batch_size=16,
        peak=1.5e-3,
    )
