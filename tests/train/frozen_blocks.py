"""Runs with and without the stored outputs of the frozen lower blocks."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from tests.tasks import clip
from tests.tasks.vit import tiny
from zinit.adapter.attach import attach
from zinit.config import PrefixConfig
from zinit.models.loading import ClipProcessor
from zinit.tasks.base import TaskInputs
from zinit.tasks.base_to_novel.task import BaseToNovel, BaseToNovelConfig
from zinit.tasks.vtab.task import VTAB, VTABConfig
from zinit.train.activation_cache import stored_activations
from zinit.train.config import TrainConfig
from zinit.train.events import Event, Step
from zinit.train.loop import fit

TRAIN, DEPTH = 12, 4  # pictures, blocks
TRIED = 3  # passes through the frozen blocks before any is stored: one example, two, two in training
Fit = namedtuple("Fit", "losses weights calls folders")


def vtab(
    data: Path, *, layers: int | tuple[int, ...] | None = 2, length: int = 3, model: Any = None, **settings: Any
) -> VTAB:
    model = model or tiny(depth=DEPTH)
    handle = attach(model, PrefixConfig(length=length, layers=layers, gate_init=0.3), seed=1)
    seed = settings.pop("seed", 0)
    return VTAB(TaskInputs(model=model, handle=handle, data=str(data), seed=seed), VTABConfig(**settings))


def base_to_novel(data: Path, prefix: dict[str, Any], **settings: Any) -> Any:
    model = clip.clip()
    handle = attach(model, PrefixConfig(**{"length": 3, "layers": 1, "gate_init": 0.3, **prefix}), seed=1)
    config = BaseToNovelConfig(**{"shots": 2, **settings})
    return BaseToNovel(
        TaskInputs(model=model, processor=ClipProcessor(clip.tokenizer()), handle=handle, data=str(data)), config
    )


def lowest_norm(model: Any) -> nn.Module:
    """A part of the lowest block that runs once with it."""
    return model.blocks[0].norm1 if hasattr(model, "blocks") else model.vision_model.encoder.layers[0].layer_norm1


def trained(task: Any, cache: Path | None = None, *, lowest: Any = None, **settings: Any) -> Fit:
    """A run of three epochs in steps of four examples. ``lowest`` is the module whose calls are counted."""
    events: list[Event] = []
    calls: list[int] = []
    hook = (lowest or lowest_norm(task.model)).register_forward_hook(
        lambda module, args, output: calls.append(len(output))
    )
    config = TrainConfig(
        **{"epochs": 3, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 0.05, "warmup_steps": 1}
        | {"evaluate_every": 0, "activation_cache": None if cache is None else str(cache), **settings}
    )
    accelerator = Accelerator(cpu=True)
    fit(
        task,
        config,
        seed=3,
        accelerator=accelerator,
        on_event=events.append,
        batches=stored_activations(task, config, accelerator, events.append),
    )
    hook.remove()
    return Fit(
        [event.loss for event in events if isinstance(event, Step)],
        {name: p.detach().clone() for name, p in task.named_parameters() if p.requires_grad},
        calls,
        sorted(cache.iterdir()) if cache else [],
    )


def assert_same_bits(found: Fit, expected: Fit) -> None:
    assert found.losses == expected.losses
    assert found.weights.keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        assert torch.equal(found.weights[name], value), name
