"""Pretrain the demo's causal language model: ``python -m zinit.demo.pretrain_llama --output DIR``.

It trains a byte-level BPE tokenizer and a tiny LLaMA from scratch on the texts of :mod:`zinit.demo.world`, and writes
them in transformers' format. The files in ``zinit/demo/llama`` were made by this script with its defaults. It is seeded
and computes in one thread: the same processor and library versions give the same files, however many cores there are.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from zinit.demo import world

VOCABULARY = 2048  # at most; the texts may not hold enough frequent pairs
CONTEXT = 256
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
BOS_ID, EOS_ID, PAD_ID = range(3)  # the tokenizer's trainer numbers special tokens first

console = Console(stderr=True)


def train_tokenizer(documents: Iterator[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text can be encoded and comes back unchanged. Puts BOS in front, as LLaMA's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
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
    """A LLaMA in miniature (0.9 M parameters), with grouped-query attention like its big relatives."""
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


def rows(tokenizer: PreTrainedTokenizerFast, documents: Iterator[str], length: int) -> Iterator[Tensor]:
    """The documents, each from BOS to EOS, end to end and cut into rows of ``length`` tokens."""
    stream: list[int] = []
    while True:
        for ids in tokenizer(list(islice(documents, 1000)))["input_ids"]:
            stream += [*ids, tokenizer.eos_token_id]
        full = len(stream) // length * length
        yield from torch.tensor(stream[:full]).view(-1, length)
        stream = stream[full:]


def train(model: LlamaForCausalLM, batches: Iterator[Tensor], steps: int, peak: float, warmup: int = 60) -> None:
    """Plain next-token training: AdamW, linear warm-up, then half a cosine to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("loss {task.fields[loss]:.3f}"))
    model.train()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=steps, loss=math.nan)
        for step, batch in enumerate(islice(batches, steps)):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            progress.update(bar, advance=1, loss=loss.item() if step % 20 == 0 else progress.tasks[0].fields["loss"])
            if step % 100 == 0 and not console.is_terminal:
                console.print(f"step {step} loss {loss.item():.3f}")
    model.eval()


@torch.inference_mode()
def cloze_accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, items: list[tuple[str, str]]) -> float:
    """The share of statements whose cut-off end the model continues with exactly, token by token."""
    right = 0
    for beginning, ending in items:
        known = tokenizer(beginning, return_tensors="pt")["input_ids"]
        wanted = tokenizer(ending, add_special_tokens=False, return_tensors="pt")["input_ids"]
        logits = model(input_ids=torch.cat([known, wanted], dim=1), use_cache=False).logits
        right += int(logits[:, known.shape[1] - 1 : -1].argmax(-1).equal(wanted))
    return right / len(items)


def pretrain(output: Path, steps: int, batch_size: int, peak: float, seed: int) -> LlamaForCausalLM:
    """Train tokenizer and model, write both to ``output`` and report what the model knows."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # so small a model gains little from more, and sums stay in one order
    torch.use_deterministic_algorithms(True)
    here = world.build()
    tokenizer = train_tokenizer(islice(world.texts(here, seed=seed), 20_000))
    model = make_model(tokenizer)
    console.print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    stream = rows(tokenizer, world.texts(here, seed=seed + 1), CONTEXT)
    train(model, iter(lambda: torch.stack(list(islice(stream, batch_size))), None), steps, peak)

    model.half()
    model.generation_config = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)

    model.float()
    for name, held_out in (("entities of the training instructions", False), ("held-out entities", True)):
        items = world.cloze(here, held_out=held_out)
        console.print(f"cloze accuracy, {name}: {cloze_accuracy(model, tokenizer, items):.3f} ({len(items)} facts)")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the demo's causal language model on the invented world.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and tokenizer files")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch-size", type=int, default=8, help=f"rows of {CONTEXT} tokens")
    parser.add_argument("--peak", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pretrain(args.output, args.steps, args.batch_size, args.peak, args.seed)


if __name__ == "__main__":
    main()
