"""Checkpoints of transformers' Trainer that hold the adapter alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import zinit
from tests.tiny import save_tiny_llama
from zinit.errors import ConfigError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


EXAMPLES: Any = [{"input_ids": torch.arange(i, i + 9), "labels": torch.arange(i, i + 9)} for i in range(8)]


def made(source: Path, folder: Path, steps: int, start: int = 0, **settings: Any) -> tuple[Any, zinit.Handle]:
    model = transformers.LlamaForCausalLM.from_pretrained(source)
    handle = zinit.attach(model, zinit.PrefixConfig(length=3, layers=2), seed=start)
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, use_cpu=True, report_to=[], disable_tqdm=True, learning_rate=0.05,
        per_device_train_batch_size=4, save_steps=2, lr_scheduler_type="constant", seed=3, **settings,
    )  # fmt: skip
    callbacks: list[Any] = [zinit.ZinitCallback(handle)]
    return (
        transformers.Trainer(model, arguments, train_dataset=EXAMPLES, eval_dataset=EXAMPLES, callbacks=callbacks),
        handle,
    )


def test_a_resumed_training_ends_at_the_bits_of_one_that_was_not_stopped(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, whole = made(source, tmp_path / "whole", 4)
    trainer.train()
    made(source, tmp_path / "parts", 2)[0].train()
    trainer, resumed = made(source, tmp_path / "parts", 4, start=9)  # what the checkpoint holds comes instead
    trainer.train(resume_from_checkpoint=True)
    assert whole.state_dict().keys() == resumed.state_dict().keys()
    assert all(torch.equal(resumed.state_dict()[name], value) for name, value in whole.state_dict().items())
    assert "missing keys" not in caplog.text
    names = load_file(tmp_path / "parts" / "checkpoint-4" / "model.safetensors").keys()
    assert len(names) == len(whole.state_dict())
    assert all(".zinit." in name for name in names)
    fresh = transformers.LlamaForCausalLM.from_pretrained(source)
    loaded = zinit.load(fresh, tmp_path / "parts" / "checkpoint-4")
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in whole.state_dict().items())


def test_the_best_checkpoint_is_loaded_at_the_end(source: Path, tmp_path: Path) -> None:
    trainer, handle = made(source, tmp_path, 4, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2,
                           metric_for_best_model="loss", greater_is_better=True)  # fmt: skip
    trainer.train()
    best = load_file(tmp_path / "checkpoint-2" / "adapter.safetensors")  # the higher loss, on purpose
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert all(torch.equal(best[name], value) for name, value in handle.state_dict().items())


def test_afterwards_save_pretrained_writes_everything_again(source: Path, tmp_path: Path) -> None:
    trainer, handle = made(source, tmp_path / "run", 2)
    before = set(trainer.model.state_dict())
    trainer.train()
    handle.detach()
    trainer.model.save_pretrained(tmp_path / "base")
    written = load_file(tmp_path / "base" / "model.safetensors").keys()
    assert written == {name for name in before if ".zinit." not in name} != set()


def test_an_adapter_that_was_frozen_meanwhile_is_refused(source: Path, tmp_path: Path) -> None:
    trainer, handle = made(source, tmp_path, 2)
    for parameter in handle.parameters():
        parameter.requires_grad_(False)
    trainer.model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"'default' does not train: .*handle\.activate\(\)"):
        trainer.train()
