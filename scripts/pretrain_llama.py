"""Pretrain the demo's causal language model: ``python -m scripts.pretrain_llama --output DIR``.

It trains a byte-level BPE tokenizer and a tiny LLaMA from scratch on the texts of :mod:`zinit.demo.world`, and writes
them in transformers' format. The files in ``zinit/demo/llama`` were made by this script with its defaults. It is seeded
and computes in one thread: the same processor and library versions give the same files, however many cores there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import processors
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.pretraining import command, console, fit, seed_everything, train_bpe
from zinit.demo import world

VOCABULARY = 2048  # at most; the texts may not hold enough frequent pairs
CONTEXT = 256
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
BOS_ID, EOS_ID, PAD_ID = range(3)  # the tokenizer's trainer numbers special tokens first


def train_tokenizer(documents: Iterator[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text can be encoded and comes back unchanged. Puts BOS in front, as LLaMA's does."""
    tokenizer = train_bpe(documents, vocabulary=VOCABULARY, special=[BOS, EOS, PAD], space=False)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A LLaMA in miniature (0.9 M parameters), with grouped-query attention."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
            pad_token_id=PAD_ID,
        )
    )


def sequences(tokenizer: PreTrainedTokenizerFast, documents: Iterator[str], length: int) -> Iterator[Tensor]:
    """The documents, each from BOS to EOS, concatenated and cut into sequences of ``length`` tokens."""
    stream: list[int] = []
    while True:
        for ids in tokenizer(list(islice(documents, 1000)))["input_ids"]:
            stream += [*ids, tokenizer.eos_token_id]
        full = len(stream) // length * length
        yield from torch.tensor(stream[:full]).view(-1, length)
        stream = stream[full:]


def losses(model: LlamaForCausalLM, sequences: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    """The loss of plain next-token prediction, batch after batch."""
    while True:
        batch = torch.stack(list(islice(sequences, size)))
        yield model(input_ids=batch, labels=batch, use_cache=False).loss


@torch.inference_mode()
def cloze_accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, items: list[tuple[str, str]]) -> float:
    """The fraction of statements whose cut-off end the model predicts exactly, token by token."""
    right = 0
    for beginning, ending in items:
        known = tokenizer(beginning, return_tensors="pt")["input_ids"]
        wanted = tokenizer(ending, add_special_tokens=False, return_tensors="pt")["input_ids"]
        logits = model(input_ids=torch.cat([known, wanted], dim=1), use_cache=False).logits
        right += int(logits[:, known.shape[1] - 1 : -1].argmax(-1).equal(wanted))
    return right / len(items)


def pretrain(output: Path, steps: int, batch_size: int, peak: float, seed: int) -> LlamaForCausalLM:
    """Train tokenizer and model, write both to ``output`` and report how many facts the model knows."""
    seed_everything(seed)
    here = world.build()
    tokenizer = train_tokenizer(islice(world.texts(here, seed=seed), 20_000))
    model = make_model(tokenizer)
    console.print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    stream = sequences(tokenizer, world.texts(here, seed=seed + 1), CONTEXT)
    fit(model, losses(model, stream, batch_size), steps, peak, warmup=60, beta2=0.95, decay=0.1)

    model.half()
    model.generation_config = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)

    model.float()
    for name, held_out in (("entities of the training instructions", False), ("held-out entities", True)):
        items = world.cloze(here, held_out=held_out)
        console.print(f"cloze accuracy, {name}: {cloze_accuracy(model, tokenizer, items):.3f} ({len(items)} facts)")
    return model


if __name__ == "__main__":
    command(
        pretrain,
        "Pretrain the demo's causal language model on the invented world.",
        steps=2400,
        batch_size=8,
        peak=4e-3,
    )
