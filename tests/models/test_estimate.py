"""What a training step takes, estimated on the meta device: against counts by hand and against a real step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from tests.tiny import save_tiny_llama
from zinit.adapter.attach import attach
from zinit.config import AdapterConfig, PrefixConfig, TuningConfig
from zinit.errors import ConfigError
from zinit.methods import METHODS
from zinit.methods.base import ApplyContext
from zinit.models.estimate import Rates, estimate_step
from zinit.models.loading import load_on_meta
from zinit.models.losses import chunked_cross_entropy
from zinit.train.strategy import describe
from zinit.ui.inspection import describe_training, estimate_training, inspect_model

SLOW = Rates(flops=1.0, bandwidth=1e30)  # a second for each operation


class Layers(nn.Module):
    """Two frozen layers, one that trains, and a frozen one above it."""

    main_input_name, config = "pixel_values", SimpleNamespace(image_size=4)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)))
        self.requires_grad_(False)
        self.layers[2].weight.requires_grad_(True)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.layers(pixel_values)


def test_operations_and_bytes_by_hand() -> None:
    with torch.device("meta"):
        model = Layers()
    found = estimate_step(model, [model.layers[2].weight], batch=2, length=1, rates=SLOW)
    rows = 2 * 3 * 4  # of 4 numbers
    product = 2 * rows * 4 * 4
    assert found.flops == found.seconds == product * (4 + 2)  # back through the last layer, and the weight's gradient
    assert (found.weights, found.adapter) == (3 * 16 * 4, 4 * 16 * 4)
    assert 2 * rows * 16 <= found.activations <= 5 * rows * 16, "what the trained layer saw, and what passes by"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


def test_operations_are_those_of_a_real_step(source: Path) -> None:
    meta: Any = load_on_meta(source).to(torch.float32)
    handle = attach(meta, PrefixConfig(length=3, layers=2))
    found = estimate_step(meta, list(handle.parameters()), batch=2, length=24, rates=SLOW)
    model = LlamaForCausalLM.from_pretrained(source).train()
    attach(model, PrefixConfig(length=3, layers=2))
    ids = torch.zeros(2, 24, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        chunked_cross_entropy(hidden, model.lm_head.weight, None, ids.flatten()).backward()
    assert found.flops == counter.get_total_flops() > 0


def test_it_grows_with_the_batch_and_not_with_frozen_layers_below(source: Path) -> None:
    one, two, top = (
        estimate_training(str(source), batch=batch, length=64, options=["prefix.length=3", f"prefix.layers={layers}"])
        for batch, layers in ((1, 3), (2, 3), (2, 1))
    )
    assert two["activations_bytes"] == pytest.approx(2 * one["activations_bytes"], rel=0.1)
    assert top["activations_bytes"] < two["activations_bytes"]
    model = load_on_meta(source)
    size = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    assert top["weights_bytes"] == two["weights_bytes"] == 4 * size
    said = describe_training(two)
    assert "a step of 2 x 64 tokens on cpu in float32, estimated:" in said


@pytest.mark.parametrize(("method", "settings"), [("lora", ["method.rank=2"]), ("bias-tuning", []), ("full", [])])
def test_every_methods_step_is_estimated_with_what_it_trains(method: str, settings: list[str], source: Path) -> None:
    options = [f"method={method}", *settings]
    found = estimate_training(str(source), batch=2, length=24, options=options)
    model: Any = LlamaForCausalLM.from_pretrained(source)
    chosen = METHODS.get(method)
    config = chosen.Config.from_dict({"rank": 2} if settings else {})
    adapter = AdapterConfig(parts={"prefix": PrefixConfig()}, tuning=TuningConfig(scale="output"))
    context = ApplyContext(prefix=PrefixConfig(), adapter=adapter, backbone="llama", seed=0)
    model = chosen(config).apply(model, context).model.train()
    numbers = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert inspect_model(str(source), options=options)["num_trainable"] == numbers
    assert found["adapter_bytes"] == 4 * 4 * numbers
    ids = torch.zeros(2, 24, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        chunked_cross_entropy(hidden, model.lm_head.weight, None, ids.flatten()).backward()
    assert found["flops"] == counter.get_total_flops() > 0


@pytest.mark.parametrize(
    ("option", "message"),
    [("method=logistic-regression", "trains nothing in the model"), ("train.epochs=3", "says nothing about what goes")],
)
def test_what_has_no_step_of_its_own_is_refused(option: str, message: str, source: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        estimate_training(str(source), batch=2, length=24, options=[option])


def test_a_method_that_puts_the_model_into_another_is_not_estimated(source: Path) -> None:
    options = ["method=peft-prefix-tuning", "prefix.length=3"]
    assert inspect_model(str(source), options=options)["num_trainable"] > 0
    with pytest.raises(ConfigError, match="puts the model into another"):
        estimate_training(str(source), batch=2, length=24, options=options)


def test_apples_gpus_are_said_to_be_untested() -> None:
    accelerator: Any = SimpleNamespace(num_processes=1, device=torch.device("mps"))
    assert describe(accelerator) == "one process on mps (Apple's GPUs are not tested)"
