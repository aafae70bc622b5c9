"""Memory and time of a training step before a weight is loaded.

The step, forward, backward and the optimizer's, runs on the meta device, where tensors have shapes and no values. Every
storage that it makes is counted while it lives, and every operation takes the longer of what its arithmetic and what
its traffic take, at the rates that this machine reaches.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zinit.compat import watch_operations
from zinit.errors import ConfigError, first_line
from zinit.models.losses import chunked_cross_entropy

FASTEST, SECONDS = 2048, 0.2  # size of the measured product; how long each rate is measured


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a machine reaches.

    Attributes:
        flops: multiplications and additions a second, in a large matrix product.
        bandwidth: bytes a second, read or written.
    """

    flops: float
    bandwidth: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a training step takes.

    Attributes:
        weights: bytes of the model, the adapter aside.
        adapter: bytes of what trains, its gradients and the optimizer's moments.
        activations: bytes at the peak of the step beside these.
        flops: of the step.
        seconds: of the step, at the rates.
    """

    weights: int
    adapter: int
    activations: int
    flops: int
    seconds: float

    @property
    def peak(self) -> int:
        """Bytes in all at the peak."""
        return self.weights + self.adapter + self.activations


class _Count:
    """Bytes that are alive, the most there were, and the time of all operations.

    Args:
        rates: of the machine.
    """

    def __init__(self, rates: Rates) -> None:
        self.rates, self.known, self.live, self.peak = rates, set[int](), 0, 0
        self.flops, self.seconds = 0, 0.0

    def add(self, storages: Iterable[Any]) -> None:
        for storage in storages:
            if id(storage) not in self.known:
                self.known.add(id(storage))
                self.live += storage.nbytes()
                weakref.finalize(storage, self._drop, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.live)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size

    def operation(self, flops: int, traffic: int, storages: list[Any]) -> None:
        self.add(storages)
        self.flops += flops
        self.seconds += max(flops / self.rates.flops, traffic / self.rates.bandwidth)


def estimate_step(model: nn.Module, trained: list[nn.Parameter], *, batch: int, length: int, rates: Rates) -> Estimate:
    """A step of AdamW on a batch of examples of one length, every token of which counts in the loss.

    Args:
        model: on the meta device, with what trains.
        trained: parameters.
        batch: examples of a forward pass.
        length: tokens of each; images have the model's own size.
        rates: of the machine that it will run on.

    Raises:
        ConfigError: if the model takes neither tokens nor images alone, or not as many.
    """
    model.train()
    count = _Count(rates)
    count.add(tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers()))
    weights = count.live
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    try:
        inputs = _inputs(model, batch, length)  # which may pass what a tensor can hold
        with watch_operations(count.operation):
            _loss(model, inputs).backward()
            optimizer.step()
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"a training step of {type(model).__name__} on {batch} x {length} tokens cannot be estimated: "
            f"{first_line(error)}"
        ) from error
    own = sum(parameter.nbytes for parameter in trained)
    return Estimate(
        weights=weights - own,
        adapter=4 * own,
        activations=max(0, count.peak - weights - 3 * own),
        flops=count.flops,
        seconds=count.seconds,
    )


def _inputs(model: Any, batch: int, length: int) -> dict[str, Tensor]:
    """What the model is called with."""
    if getattr(model, "main_input_name", "pixel_values") == "input_ids":
        return {"input_ids": torch.zeros(batch, length, dtype=torch.long, device="meta")}
    config = getattr(model, "config", None)
    size: Any = getattr(config, "image_size", None) or getattr(model, "default_cfg", {}).get("input_size", (0, 224))[-1]
    sides = (size, size) if isinstance(size, int) else tuple(size)
    dtype = next(model.parameters()).dtype
    return {"pixel_values": torch.zeros(batch, 3, *sides, device="meta", dtype=dtype)}


def _loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The loss of the next tokens as training computes it, or a sum of whatever else the model gives."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if "input_ids" in inputs and isinstance(head, nn.Linear):
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        return chunked_cross_entropy(hidden, head.weight, head.bias, inputs["input_ids"].flatten())
    found = model(**inputs) if hasattr(model, "config") else model(inputs["pixel_values"])
    found = getattr(found, "last_hidden_state", found)
    if not isinstance(found, Tensor):
        raise ConfigError(
            f"a training step of {type(model).__name__} cannot be estimated: it reads more than tokens or images alone."
        )
    return found.float().sum()


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """What a device reaches in a large matrix product, and in copying.

    Args:
        device: that training will run on.
        dtype: of the model.
    """
    side = FASTEST // (4 if device.type == "cpu" else 1)
    left = torch.ones(side, side, device=device, dtype=dtype)
    large = torch.ones(2**24, device=device, dtype=torch.float32)
    copy = torch.empty_like(large)
    return Rates(
        flops=2 * side**3 / _time(lambda: left @ left, device),
        bandwidth=2 * large.nbytes / _time(lambda: copy.copy_(large), device),
    )


def _time(action: Any, device: torch.device) -> float:
    """Seconds of one call: the median of as many as fit."""
    times = list[float]()
    until = time.perf_counter() + SECONDS
    while len(times) < 3 or time.perf_counter() < until:
        started = time.perf_counter()
        action()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]
