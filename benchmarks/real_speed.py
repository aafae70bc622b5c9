"""Training steps and generation of really pretrained models on real Alpaca records: zinit, and other libraries.

    python -m benchmarks.real_speed --models DIR --data DIR [--only gemma3_270m] [--litgpt DIR]

Living processes take rounds in turn, each with its own copy of the model: zinit's engine with zero-init attention
(K = 10 in all layers), transformers' Trainer with PEFT's LoRA (r = 8 on queries and values), TRL's SFTTrainer with
the same, and LitGPT's adapter fine-tuning. All go once through the same records in batches of 8, at most 128 tokens
each, and then answer the same instructions. A round is one optimizer step with all that belongs to it; its batches
differ, so the sums over all rounds are compared. PEFT's AdaptionPrompt knows neither Gemma nor Qwen; for LLaMA see
``benchmarks.alpaca_throughput``. LitGPT knows Qwen, not Gemma 3 270M, and cannot stand beside today's huggingface_hub:

    pip install --target DIR --no-deps litgpt==0.5.13 lightning lightning-utilities pytorch-lightning torchmetrics \\
      jsonargparse docstring_parser
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, save

MODELS = ("gemma3_270m", "qwen_coder")
WAYS = ("zinit", "trainer_lora", "sft_lora", "litgpt_adapter")
LITGPT = {"qwen_coder": "Qwen2.5-Coder-0.5B"}  # its names of the models
ALPACA = Path("alpaca") / "alpaca_5000.json"
BATCH, LENGTH, TOKENS, QUESTIONS = 8, 128, 16, 4
DONE = "zinit-benchmark-done"
Wait = Callable[[], None]
Answer = Callable[[list[str]], Any]


# --- the process of a way: it waits before every round, and says when one is done ---


def work(way: str, model: Path, data: str, rounds: int) -> None:
    """Trains ``rounds`` steps and then generates, as often as it is told to."""
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    answer = TRAINERS[way](model, tokenizer, data, rounds, wait)
    prompts = [example.prompt for example in encoded(tokenizer, data)[:QUESTIONS]]
    for _ in range(rounds):
        answer(prompts)
        wait()


def loaded(model: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def answering(model: Any, tokenizer: Any) -> Answer:
    """Answers all prompts in one batch, by transformers' ``generate``."""
    model.eval()
    tokenizer.padding_side = "left"

    def answer(prompts: list[str]) -> Any:
        batch = tokenizer(prompts, return_tensors="pt", padding=True)
        return model.generate(**batch, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)

    return answer


def wait() -> None:
    """Says that a round is done, and how much memory was needed so far; goes on when told to."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{DONE} {peak}", flush=True)
    if not sys.stdin.readline():
        sys.exit(0)


def encoded(tokenizer: Any, data: str) -> list[Any]:
    """The records as Alpaca's texts, at most `LENGTH` tokens each."""
    from zinit.tasks.alpaca.examples import encode_records

    return encode_records(tokenizer, json.loads(Path(data).read_text("utf-8")), max_length=LENGTH)[0]


def with_zinit(folder: Path, tokenizer: Any, data: str, rounds: int, wait: Wait) -> Answer:
    import zinit
    from zinit.tasks.alpaca.task import Alpaca, AlpacaConfig
    from zinit.tasks.base import TaskInputs
    from zinit.train.batches import load_batches
    from zinit.train.callbacks import Callback
    from zinit.train.config import TrainConfig
    from zinit.train.loop import Stepper, run_steps
    from zinit.train.plan import Plan
    from zinit.train.strategy import make_accelerator

    class Tell(Callback):
        def on_step(self, progress: Any, step: Any) -> None:
            wait()

    model = loaded(folder)
    handle = zinit.attach(model, zinit.PrefixConfig(length=10), seed=0)
    config = TrainConfig(steps=rounds, batch_size=BATCH, micro_batch_size=BATCH, warmup_steps=0, learning_rate=1e-3)
    settings = AlpacaConfig(max_length=LENGTH, held_out_data=data)
    task = Alpaca(TaskInputs(model=model, processor=tokenizer, handle=handle, data=None, train=False), settings)
    task.train_stream = task.held_out_stream
    accelerator = make_accelerator(config)
    stepper = Stepper(task, Plan.of(task, config, 0), accelerator)
    run_steps(stepper, load_batches(stepper.plan, task.collate, accelerator, start=0), [Tell()], start=0)
    return answering(model, tokenizer)


def arguments(rounds: int, folder: str) -> dict[str, Any]:
    """What both Trainers are told."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": BATCH,
        "max_steps": rounds,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }


def telling(wait: Wait) -> Any:
    """A callback of transformers' Trainer."""
    from transformers import TrainerCallback

    class Tell(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            wait()

    return Tell()


def lora() -> Any:
    from peft import LoraConfig, TaskType

    return LoraConfig(task_type=TaskType.CAUSAL_LM, r=8, target_modules=["q_proj", "v_proj"])


def with_trainer(folder: Path, tokenizer: Any, data: str, rounds: int, wait: Wait) -> Answer:
    from peft import get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    rows = [
        {"input_ids": e.ids, "labels": [-100] * e.prompt_length + e.ids[e.prompt_length :]}
        for e in encoded(tokenizer, data)
    ]
    adapted = get_peft_model(loaded(folder), lora())
    with tempfile.TemporaryDirectory() as output:
        Trainer(
            model=adapted,
            args=TrainingArguments(**arguments(rounds, output)),
            train_dataset=rows,  # pyright: ignore[reportArgumentType]
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
            callbacks=[telling(wait)],
        ).train()
    return answering(adapted, tokenizer)


def with_sft(folder: Path, tokenizer: Any, data: str, rounds: int, wait: Wait) -> Answer:
    import datasets
    import trl

    rows = [{"prompt": e.prompt, "completion": e.response} for e in encoded(tokenizer, data)]
    with tempfile.TemporaryDirectory() as output:
        trainer = trl.SFTTrainer(
            loaded(folder),
            trl.SFTConfig(**arguments(rounds, output), max_length=LENGTH, gradient_checkpointing=False),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=lora(),
            callbacks=[telling(wait)],
        )
        trainer.train()
    return answering(trainer.model, tokenizer)


def with_litgpt(folder: Path, tokenizer: Any, data: str, rounds: int, wait: Wait) -> Answer:
    from benchmarks.real_speed_litgpt import answering, load, train

    model = load(folder, LITGPT[folder.name])
    train(model, folder, encoded(tokenizer, data), rounds, wait, batch=BATCH, length=LENGTH)
    return answering(model, tokenizer, TOKENS)


TRAINERS: dict[str, Callable[[Path, Any, str, int, Wait], Answer]] = {
    "zinit": with_zinit,
    "trainer_lora": with_trainer,
    "sft_lora": with_sft,
    "litgpt_adapter": with_litgpt,
}


# --- the process that measures ---


class Living:
    """A process of a way.

    Args:
        way: one of `WAYS`.
        model: folder.
        data: records in a file.
        rounds: steps, and generations after them.
        litgpt: where LitGPT is.
    """

    def __init__(self, way: str, model: Path, data: Path, rounds: int, litgpt: Path | None) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.peak = 0.0
        said = ["--work", way, "--models", str(model), "--data", str(data), "--rounds", str(rounds)]
        found = [os.environ.get("PYTHONPATH"), litgpt if way == "litgpt_adapter" else None]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.real_speed", *said],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, bufsize=1,
            env={
                **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                "PYTHONPATH": os.pathsep.join(str(place) for place in found if place),
            },
        )  # fmt: skip

    def finish_round(self) -> float:
        """Seconds until the round that is going on is done."""
        assert self.process.stdout is not None
        started = time.perf_counter()
        for line in self.process.stdout:
            if line.startswith(DONE):
                self.peak = float(line.split()[1])
                return time.perf_counter() - started
        self.log.seek(0)
        raise SystemExit(f"the process failed:\n{self.log.read()[-2000:]}")

    def round(self) -> float:
        """Seconds of the next round."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        return self.finish_round()

    def close(self) -> None:
        """Ends it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def that_fit(model: Path, records: list[dict[str, str]], rounds: int) -> list[dict[str, str]]:
    """As many as all rounds take, of those whose prompt leaves room for an answer: each makes one example."""
    from transformers import AutoTokenizer

    from zinit.tasks.alpaca.examples import encode_records

    tokenizer = AutoTokenizer.from_pretrained(model)
    fitting = (record for record in records if encode_records(tokenizer, [record], max_length=LENGTH)[0])
    return list(itertools.islice(fitting, BATCH * rounds))


def compare(model: Path, records: list[dict[str, str]], litgpt: Path | None) -> dict[str, Any]:
    """Figures of one model; a round for each batch of the records."""
    rounds = len(records) // BATCH
    ways = [way for way in WAYS if way != "litgpt_adapter" or (litgpt and model.name in LITGPT)]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "records.json"
        data.write_text(json.dumps(records, ensure_ascii=False), "utf-8")
        (model / "model.safetensors").read_bytes()  # the first way would read them from the disk, the others not
        living, first = {}, {}
        for way in ways:
            living[way] = Living(way, model, data, rounds, litgpt)
            first[way] = living[way].finish_round()
        steps: dict[str, list[float]] = {way: [] for way in ways}
        answers: dict[str, list[float]] = {way: [] for way in ways}
        for measured, count in ((steps, rounds - 1), (answers, rounds)):
            for number in range(count):
                for way in ways[:: 1 if number % 2 else -1]:
                    measured[way].append(living[way].round())
        for one in living.values():
            one.close()
    examples = BATCH * (rounds - 1)
    return {
        "time_over_zinit": {way: round(sum(steps[way]) / sum(steps["zinit"]), 3) for way in ways},
        "examples_per_second": {way: round(examples / sum(steps[way]), 3) for way in ways},
        "generation_time_over_zinit": {
            way: round(statistics.median(a / b for a, b in zip(answers[way], answers["zinit"], strict=True)), 3)
            for way in ways
        },
        "tokens_per_second": {way: round(QUESTIONS * TOKENS / statistics.median(answers[way]), 2) for way in ways},
        "seconds_to_the_first_step": {way: round(first[way], 1) for way in ways},
        "peak_memory_gib": {way: round(living[way].peak, 2) for way in ways},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", choices=MODELS, nargs="+", default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=7, help="steps of each, the first of which is not counted")
    parser.add_argument("--output", type=Path, default=None, help=f"default: {RESULTS.name}/real_speed-cpu.json")
    parser.add_argument("--litgpt", type=Path, default=None, help="folder that LitGPT was installed into")
    parser.add_argument("--work", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.models, str(options.data), options.rounds)
        return
    records = [record for record in json.loads((options.data / ALPACA).read_text("utf-8")) if record["output"]]
    figures = {}
    for name in options.only:
        fitting = that_fit(options.models / name, records, options.rounds)
        figures[name] = compare(options.models / name, fitting, options.litgpt)
        print(name, json.dumps(figures[name], indent=1), flush=True)
    options.device, options.models, options.data = "cpu", "DIR", "DIR"  # nothing of this machine
    options.litgpt = options.litgpt and "DIR"
    save("real_speed", options, figures)


if __name__ == "__main__":
    main()
