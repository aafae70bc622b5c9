"""Instruction tuning on real Alpaca lengths: zinit's engine against PEFT's AdaptionPrompt under transformers' Trainer.

    python -m benchmarks.alpaca_throughput
    python -m benchmarks.alpaca_throughput --width 4096 --layers 32 --heads 32 --kv-heads 32

Both train the same adapter (one unsquashed gate per layer, the same prompts to start from) on the same frozen random
LLaMA, on the same steps of 64 records, with the same AdamW settings. The Trainer is the stock one: micro-batches of 8,
each padded to its longest by DataCollatorForSeq2Seq, and the model's own loss over all logits. Needs ../shared/data.

A random model learns nothing, so the losses are compared on a small pretrained one (stories260K): both train on the
same records for the same number of epochs and are asked for the held-out loss. Only the order of the examples differs:
each shuffles by itself.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import AdaptionPromptConfig, TaskType, get_peft_model
from torch import nn
from transformers import DataCollatorForSeq2Seq, LlamaForCausalLM, LlamaTokenizer, Trainer, TrainingArguments

import zinit
from benchmarks.common import interleaved, parser, prepare, random_llama, ratio, save
from tests.stories import SHARED, SOURCE, save_stories
from zinit.tasks.alpaca.task import Alpaca, AlpacaConfig
from zinit.tasks.base import Stream, TaskInputs
from zinit.tasks.text import TextExample
from zinit.train.config import TrainConfig
from zinit.train.held_out import held_out_loss
from zinit.train.loop import fit
from zinit.train.plan import Plan, cut

DATA = SHARED / "data" / "alpaca" / "alpaca_5000.json"
TOKENIZER = SHARED / "data" / "tokenizers" / "llama" / "tokenizer.model"
MICRO = 8
OPTIMIZER = {"learning_rate": 0.01, "weight_decay": 0.02, "beta1": 0.9, "beta2": 0.95, "clip_norm": 1.0}


def with_prompts(model: nn.Module, options: argparse.Namespace, adapted: int) -> nn.Module:
    """PEFT's AdaptionPrompt in the topmost layers."""
    config = AdaptionPromptConfig(
        adapter_len=options.prefix_length, adapter_layers=adapted, task_type=TaskType.CAUSAL_LM
    )
    torch.manual_seed(1)
    return get_peft_model(model, config)  # pyright: ignore[reportArgumentType]


def zinit_task(model: nn.Module, tokenizer: Any, start: Path, **settings: Any) -> Alpaca:
    """The task on a model that starts from the prompts and gates that PEFT saved."""
    handle = zinit.import_adapter(model, start, format="peft")
    task = Alpaca(TaskInputs(model=model, processor=tokenizer, handle=handle, data=str(DATA)), AlpacaConfig(**settings))
    return task.to(next(model.parameters()).device)


def train_config(**settings: Any) -> TrainConfig:
    """Constant rate, gates decayed as the Trainer does, nothing evaluated or saved."""
    constant = {"warmup_steps": 0, "min_learning_rate": OPTIMIZER["learning_rate"], "decay_gates": True}
    return TrainConfig(**{**OPTIMIZER, **constant, "evaluate_every": 0, "save_every": 0, **settings})


def features(examples: list[TextExample]) -> list[dict[str, list[int]]]:
    """What the Trainer's collator pads: ids, and labels on the response only."""
    return [{"input_ids": e.ids, "labels": [-100] * e.prompt_length + e.ids[e.prompt_length :]} for e in examples]


def run_trainer(model: nn.Module, tokenizer: Any, examples: list[TextExample], *, batch: int, epochs: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=min(MICRO, batch),
            gradient_accumulation_steps=max(1, batch // MICRO),
            num_train_epochs=epochs,
            learning_rate=OPTIMIZER["learning_rate"],
            weight_decay=OPTIMIZER["weight_decay"],
            adam_beta1=OPTIMIZER["beta1"],
            adam_beta2=OPTIMIZER["beta2"],
            max_grad_norm=OPTIMIZER["clip_norm"],
            lr_scheduler_type="constant",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
        Trainer(model=model, args=settings, train_dataset=features(examples), data_collator=collator).train()  # pyright: ignore


def time_steps(options: argparse.Namespace) -> dict[str, Any]:
    """A round is one optimizer step of 64 records, other records each round, by each of them."""
    tokenizer = LlamaTokenizer.from_pretrained(TOKENIZER.parent)
    tokenizer.pad_token = tokenizer.eos_token
    trainer_model = with_prompts(random_llama(options), options, options.adapted)
    with tempfile.TemporaryDirectory() as folder:
        trainer_model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
        plain = zinit_task(random_llama(options), tokenizer, Path(folder))
        packed = zinit_task(random_llama(options), tokenizer, Path(folder), packing=True)
    tasks, accelerator = {"zinit": plain, "zinit_packed": packed}, Accelerator(cpu=options.device == "cpu")
    config = train_config(steps=1, batch_size=64, micro_batch_size=MICRO)
    rounds = dict.fromkeys(("trainer", *tasks), 0)

    def seed_of(name: str) -> int:
        rounds[name] += 1
        return rounds[name]

    def trainer_step() -> None:
        chosen = Plan(config, plain.train_stream, seed_of("trainer")).examples(0)
        run_trainer(trainer_model, tokenizer, [plain.train_examples[i] for i in chosen], batch=64, epochs=1)

    def step_of(name: str) -> Any:
        return lambda: fit(tasks[name], config, seed=seed_of(name), accelerator=accelerator)

    actions = {"trainer": trainer_step, **{name: step_of(name) for name in tasks}}
    # One thread computes and nothing waits, so on a CPU its own time is the time of a machine that nobody else uses.
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    seconds = interleaved(actions, rounds=options.rounds, device=options.device, warm_up=1, clock=clock)
    return {
        "zinit_examples_per_second_over_trainer": round(ratio(seconds, "trainer", "zinit"), 3),
        "zinit_packed_examples_per_second_over_trainer": round(ratio(seconds, "trainer", "zinit_packed"), 3),
        "examples_per_second": {name: round(64 / statistics.median(s), 3) for name, s in seconds.items()},
        "clock": clock.__name__,
        "tokens_with_padding_per_real_token": padding(tasks, config),
    }


def padding(tasks: dict[str, Alpaca], config: TrainConfig) -> dict[str, float]:
    """Over an epoch: positions that the model computes for every token of the data."""
    stream = tasks["zinit"].train_stream
    order = torch.randperm(len(stream), generator=torch.Generator().manual_seed(0)).tolist()
    steps = [order[i : i + 64] for i in range(0, len(order), 64)]
    in_order = [step[i : i + MICRO] for step in steps for i in range(0, len(step), MICRO)]
    computed = {"trainer": sum(len(part) * max(stream.lengths[i] for i in part) for part in in_order)}
    for name, task in tasks.items():
        computed[name] = 0
        for step in steps:
            longest_first = sorted(step, key=lambda i: -stream.lengths[i])
            for part in cut(config, stream, longest_first, 1):
                computed[name] += task.collate(task.train_stream, part)["input_ids"].numel()
    return {name: round(count / sum(stream.lengths), 3) for name, count in computed.items()}


def compare_losses(options: argparse.Namespace) -> dict[str, Any]:
    """Held-out loss of both after the same epochs on the same records, by the same code."""
    with tempfile.TemporaryDirectory() as folder:
        source, start, end = save_stories(Path(folder)), Path(folder) / "start", Path(folder) / "end"
        tokenizer = LlamaTokenizer.from_pretrained(source)
        tokenizer.pad_token = tokenizer.eos_token
        data = {"max_length": 256, "held_out": 64}

        def model() -> nn.Module:
            return LlamaForCausalLM.from_pretrained(source).to(options.device)

        theirs = with_prompts(model(), options, 4)
        theirs.save_pretrained(start)  # pyright: ignore[reportCallIssue]
        task = zinit_task(model(), tokenizer, start, **data)
        task.train_examples, stream = task.train_examples[: options.subset], task.train_stream
        lengths, counts = stream.lengths[: options.subset], stream.counts[: options.subset]
        task.train_stream = Stream(name="train", lengths=lengths, counts=counts)
        accelerator = Accelerator(cpu=options.device == "cpu")
        config = train_config(epochs=options.epochs, batch_size=MICRO, micro_batch_size=MICRO)
        before = held_out_loss(task, config, accelerator)[0]
        fit(task, config, seed=0, accelerator=accelerator)
        our_loss = held_out_loss(task, config, accelerator)[0]
        run_trainer(theirs, tokenizer, task.train_examples, batch=MICRO, epochs=options.epochs)
        theirs.save_pretrained(end)  # pyright: ignore[reportCallIssue]
        their_loss = held_out_loss(zinit_task(model(), tokenizer, end, **data), config, accelerator)[0]
    return {
        "held_out_loss": {"start": round(before, 4), "trainer": round(their_loss, 4), "zinit": round(our_loss, 4)},
        "held_out_loss_zinit_over_trainer": round(our_loss / their_loss, 5),
        "fall_of_the_loss_zinit_over_trainer": round((before - our_loss) / (before - their_loss), 4),
        "loss_steps": math.ceil(options.subset / MICRO) * options.epochs,
    }


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.set_defaults(width=256, layers=8, heads=4, kv_heads=4, vocabulary=32_000, rounds=5, threads=1)
    options.add_argument("--subset", type=int, default=256, help="examples of the comparison of losses")
    options.add_argument("--epochs", type=int, default=3, help="of the comparison of losses")
    options = options.parse_args()
    prepare(options)
    missing = [str(path) for path in (DATA, TOKENIZER, SOURCE) if not path.exists()]
    if missing:
        sys.exit(f"skipped: {', '.join(missing)} are needed.")
    figures = time_steps(options) | compare_losses(options)
    save("alpaca_throughput", options, figures)


if __name__ == "__main__":
    main()
