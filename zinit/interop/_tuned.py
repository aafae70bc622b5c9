"""A tuned adapter of a LLaMA as writers of formats ask for it: all its vectors, neutral where nothing is learned."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from zinit.adapter.handle import Handle
from zinit.adapter.parts import Part
from zinit.backbones.layers import HEAD, widths_of
from zinit.config import AdapterConfig, TuningConfig
from zinit.errors import CheckpointError
from zinit.interop import _llama as llama
from zinit.interop._layers import cannot, model_type


class TunedLlama:
    """What an adapter changes in a LLaMA.

    Args:
        handle: the adapter.
        format: that it is written in, for messages.

    Attributes:
        config: of its tuning.
        part: its only one; None has none.
        blocks: the model's, by path.

    Raises:
        CheckpointError: if it has several parts, no tuning, or is of another model.
    """

    def __init__(self, handle: Handle, format: str) -> None:
        config = AdapterConfig.of(handle.config)
        if config.tuning is None:
            raise cannot(format, "it tunes nothing, and the format holds biases and norms")
        if len(config.parts) > 1:
            raise cannot(format, f"it has the parts {', '.join(config.parts)}, and the format holds one")
        if model_type(handle) != "llama":
            raise cannot(
                format, f"the code that reads it runs LLaMA only, and this adapter's model is {model_type(handle)!r}"
            )
        self.handle, self.format = handle, format
        self.config: TuningConfig = config.tuning
        self.part: Part | None = next(iter(handle.parts.values()), None)
        self.sites = list(handle.state.sites.values())
        paths = llama.LlamaPaths(handle.model, self.sites, format)
        self.blocks, self.last_norm = paths.blocks, paths.last_norm
        own = ((name.removeprefix("tuning."), p) for name, p in handle.named_parameters() if name.startswith("tuning."))
        self._learned = {name: p.detach().to("cpu", torch.float32) for name, p in own}

    def refuse_lora(self) -> None:
        """Raises: CheckpointError, if there is any."""
        if self.config.lora_rank:
            raise cannot(self.format, "it has LoRA, and the format has none")

    def refuse_scale(self, *allowed: str) -> None:
        """Raises: CheckpointError, if its scales are not where the format has them."""
        if self.config.scale not in (*allowed, "none"):
            where = {"output": "the output", "input": "the input"}
            has = f"scales {where[allowed[0]]}" if allowed else "has no scales"
            raise cannot(self.format, f"it scales {where[self.config.scale]} of linear layers, and the format {has}")

    def refuse_head(self) -> None:
        """Raises: CheckpointError, if the output head is tuned."""
        if HEAD in self.config.linears or HEAD in (self.config.lora_linears or ()):
            raise cannot(self.format, "it tunes the output head, and the format does not")

    def refuse_bare_prompts(self, linears: Iterable[str] = (llama.KEY, llama.VALUE)) -> None:
        """Raises: CheckpointError, if prompts pass the base's projections and words do not."""
        if self.part is None or self.config.prompts_through != "base":
            return
        if any(f"{block}.{linear}.{kind}" in self._learned
               for block in self.blocks for linear in linears for kind in ("bias", "scale")):  # fmt: skip
            raise cannot(self.format, "its prompts pass the base's projections, and the format's the tuned ones")

    def vector(self, path: str, kind: str) -> Tensor:
        """What is learned for a linear layer, "bias", "scale", "lora_down" or "lora_up"; else what changes nothing."""
        if (found := self._learned.get(f"{path}.{kind}")) is not None:
            return found
        widths = widths_of(self.handle.model.get_submodule(path))
        assert widths is not None
        into, out = widths
        if kind == "scale":
            return torch.ones(into if self.config.scale == "input" else out)
        shape = {"bias": (out,), "lora_down": (self.config.lora_rank, into), "lora_up": (out, self.config.lora_rank)}
        return torch.zeros(shape[kind])

    def norm(self, path: str) -> Tensor:
        """The weights of a norm: those learned, else the host's."""
        if (found := self._learned.get(f"{path}.weight")) is not None:
            return found
        host = self.handle.model.get_submodule(path).get_parameter("weight")
        if host.is_meta:
            raise CheckpointError(
                f"writing {self.format} needs the weights of the norms that this adapter leaves as they are, and they "
                f"are not available here. Load the model with its weights."
            )
        return host.detach().to("cpu", torch.float32, copy=True)
