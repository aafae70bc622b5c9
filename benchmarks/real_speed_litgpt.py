"""LitGPT's adapter fine-tuning and its generation, for `benchmarks.real_speed`; read against LitGPT 0.5.13."""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from litgpt.adapter import GPT, Config, mark_only_adapter_as_trainable
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data.base import get_sft_collate_fn
from litgpt.finetune import adapter
from litgpt.generate.base import generate
from litgpt.scripts.convert_hf_checkpoint import copy_weights_qwen_2_5
from litgpt.utils import instantiate_torch_optimizer
from safetensors.torch import load_file
from torch.utils.data import DataLoader


def load(folder: Path, name: str) -> Any:
    """Qwen 2.5 with an adapter of 10 prompts in all layers but two, LitGPT's defaults.

    LitGPT keeps the keys and values of the prompts of its first forward while it trains, which is that of a
    validation: prompts get no gradient then (its issue 1287). They are forgotten before every forward of training here.

    Args:
        folder: of a model of transformers.
        name: LitGPT's of it.
    """

    def forget(*_: Any) -> None:
        if model.training:
            forget_prompts(model)

    config, weights = Config.from_name(name), {}
    model = GPT(config)
    copy_weights_qwen_2_5(config, {}, weights, load_file(folder / "model.safetensors"), dtype=torch.float32)
    model.load_state_dict(weights, strict=False, assign=True)
    mark_only_adapter_as_trainable(model)
    model.register_forward_pre_hook(forget)
    return model


def forget_prompts(model: Any) -> None:
    """What is kept of the prompts is made anew by the next forward."""
    for block in model.transformer.h:
        block.attn.adapter_kv_cache = None


class Telling:
    """LitGPT's schedule, which says when a step is done."""

    def __init__(self, optimizer: Any, rounds: int, wait: Callable[[], None]) -> None:
        schedule = adapter.get_lr_scheduler(optimizer, warmup_steps=1, max_steps=rounds)
        self.advance, self.get_last_lr, self.wait = schedule.step, schedule.get_last_lr, wait

    def step(self) -> None:
        self.advance()
        self.wait()


def train(
    model: Any, folder: Path, examples: list[Any], rounds: int, wait: Callable[[], None], *, batch: int, length: int
) -> None:
    """LitGPT's own loop; ``wait`` is called after every step."""
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="32-true")
    optimizer = fabric.setup_optimizers(instantiate_torch_optimizer("AdamW", model.parameters(), lr=1e-3))
    counts = ("raw", "raw_plus_prompt_template")
    rows: Any = [
        {
            "input_ids": torch.tensor(e.ids),
            "labels": torch.tensor([-100] * e.prompt_length + e.ids[e.prompt_length :]),
            "token_counts": dict.fromkeys(counts, len(e.ids)),
        }
        for e in examples
    ]
    collate = get_sft_collate_fn(max_seq_length=length)
    schedule: Any = Telling(optimizer, rounds, wait)
    nothing: Any = None  # its data are for sample answers, of which there are none
    adapter.fit(
        fabric=fabric,
        model=fabric.setup_module(model),
        optimizer=optimizer,
        scheduler=schedule,
        train_dataloader=DataLoader(rows, batch_size=batch, collate_fn=collate),
        val_dataloader=DataLoader(rows[:1], collate_fn=collate),
        devices=1,
        checkpoint_dir=folder,
        out_dir=folder,
        train=TrainArgs(
            global_batch_size=batch, micro_batch_size=batch, max_steps=rounds, epochs=2, save_interval=None
        ),
        eval=EvalArgs(interval=rounds + 1),
        data=nothing,
    )
    model.eval()


def answering(model: Any, tokenizer: Any, tokens: int) -> Callable[[list[str]], Any]:
    """Answers one prompt after another: LitGPT's ``generate`` takes one."""
    forget_prompts(model)  # as the last step of training left them

    @torch.no_grad()
    def answer(prompts: list[str]) -> Any:
        found = []
        for prompt in prompts:
            ids = torch.tensor(tokenizer(prompt).input_ids)
            model.max_seq_length = len(ids) + tokens
            model.set_kv_cache(batch_size=1)
            found.append(generate(model, ids, len(ids) + tokens, temperature=0.0, top_k=1))
            model.clear_kv_cache()
        return found

    return answer
