"""Frozen settings: they name themselves in errors and round-trip through JSON and TOML."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args, get_type_hints

from zinit.errors import ConfigError
from zinit.registry import did_you_mean


def to_json(document: Any, *, indent: int | None = None) -> str:
    """Strict JSON: numbers that are none (a diverged loss) become null, which every reader understands."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(document), indent=indent, ensure_ascii=False, allow_nan=False)


class JsonConfig:
    """What every settings class shares: strict construction from plain dictionaries, and back."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Builds the settings from plain values (JSON, TOML).

        Raises:
            ConfigError: on an unknown name (with the nearest known one), a missing one, or a wrong value.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"{cls.__name__} is built from named settings; got {values!r}.")
        fields = {field.name: field for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
        for name in values:
            if name not in fields:
                raise ConfigError(f"{cls.__name__} has no setting {name!r}.{did_you_mean(name, fields)}")
        missing = [
            name
            for name, field in fields.items()
            if name not in values
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ConfigError(f"{cls.__name__} needs {', '.join(missing)}.")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            field.name: list(value) if isinstance(value := getattr(self, field.name), tuple) else value
            for field in dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
        }

    def _check_choices(self) -> None:
        """Every ``Literal`` field holds one of its values."""
        for name, hint in get_type_hints(type(self)).items():
            choices = get_args(hint)
            if choices and all(isinstance(choice, str) for choice in choices) and getattr(self, name) not in choices:
                got = getattr(self, name)
                raise ConfigError(f"{name} must be one of {', '.join(map(repr, choices))}; got {got!r}.")


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, kw_only=True)
class PrefixConfig(JsonConfig):
    """How a prefix is built and where it goes. The paper's ablations are settings here, not other classes.

    Args:
        length: K, prompts per adapted layer. Paper (Alpaca): 10.
        layers: L, how many of the topmost layers; ``None`` is all of them; a tuple names absolute 0-based layers.
            Paper (LLaMA-7B): 30 of 32. In a model of several towers (CLIP's text and vision model, an encoder and a
            decoder) each tower counts its own layers.
        towers: which towers get a prefix, each named by its path in the model or a part of it (``"vision_model"``);
            ``None`` is all of them.
        gate: how a stored gate is squashed: ``"tanh"`` (ICLR version, Eq. 7, and the reference's training code) or
            ``"identity"`` (first arXiv versions, the reference's inference code, PEFT, LitGPT).
        gate_per: one gate per ``"head"`` (all versions of the paper, "in practice") or one per ``"layer"``.
        gate_init: where every gate starts. 0 is zero-init attention; ``"random"`` draws from N(0, 1), the paper's
            ablation of it.
        gating: ``False`` leaves the gate out: the prompts' attention is added with weight one.
        separate_softmax: ``False`` lets prompts and words share one softmax, which is plain prefix tuning. There is
            no gate then (``gating`` must be ``False``).
        parametrization: what is learned: ``"prompt"``, K vectors of the model's width that pass the host's frozen key
            and value projections (LLaMA-Adapter), or ``"key_value"``, the keys and values themselves (P-tuning v2).
        init_std: prompts (or keys and values) start from N(0, init_std^2). The reference uses 1.
        prompt: where the prompts come from: a learned ``"table"``, the ``"context"`` that comes with a call and nothing
            else, or the sum of both, ``"table+context"`` (Eq. 10).
        prompts: what is learned for a table: the ``"table"`` itself, or a small network that makes the tables of all
            layers, ``"hyper"`` (arXiv 2502.03029). All parts of an adapter that say so share one network.
    """

    length: int = 10
    layers: int | tuple[int, ...] | None = None
    towers: tuple[str, ...] | None = None
    gate: Literal["tanh", "identity"] = "tanh"
    gate_per: Literal["head", "layer"] = "head"
    gate_init: float | Literal["random"] = 0.0
    gating: bool = True
    separate_softmax: bool = True
    parametrization: Literal["prompt", "key_value"] = "prompt"
    init_std: float = 1.0
    prompt: Literal["table", "context", "table+context"] = "table"
    prompts: Literal["table", "hyper"] = "table"

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_prompts()
        if isinstance(self.length, bool) or not isinstance(self.length, int) or self.length < 1:
            raise ConfigError(f"length (prompts per layer) must be a whole number of at least 1; got {self.length!r}.")
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        if isinstance(self.layers, tuple):
            if not self.layers or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in self.layers):
                raise ConfigError(f"layers must name 0-based layers such as (2, 3, 4); got {self.layers!r}.")
            if list(self.layers) != sorted(set(self.layers)):
                raise ConfigError(f"layers must be ascending without repeats; got {self.layers!r}.")
        elif self.layers is not None and (
            isinstance(self.layers, bool) or not isinstance(self.layers, int) or self.layers < 1
        ):
            raise ConfigError(
                f"layers must be a count of topmost layers (at least 1), a list of 0-based layers, or null for all; "
                f"got {self.layers!r}."
            )
        if isinstance(self.towers, list):
            object.__setattr__(self, "towers", tuple(self.towers))
        if self.towers is not None and (
            not isinstance(self.towers, tuple)
            or not self.towers
            or not all(isinstance(t, str) and t for t in self.towers)
        ):
            raise ConfigError(
                f"towers must be a list of names such as ['vision_model'], or null for all; got {self.towers!r}."
            )
        if isinstance(self.gate_init, str):
            if self.gate_init != "random":
                raise ConfigError(f"gate_init must be a number or 'random'; got {self.gate_init!r}.")
        elif not _is_finite(self.gate_init):
            raise ConfigError(f"gate_init must be a finite number or 'random'; got {self.gate_init!r}.")
        if not isinstance(self.gating, bool) or not isinstance(self.separate_softmax, bool):
            got = f"gating={self.gating!r} and separate_softmax={self.separate_softmax!r}"
            raise ConfigError(f"gating and separate_softmax must be true or false; got {got}.")
        if not _is_finite(self.init_std) or self.init_std < 0:
            raise ConfigError(f"init_std must be a finite number of at least 0; got {self.init_std!r}.")
        if not self.separate_softmax and self.gating:
            raise ConfigError(
                "a softmax shared by prompts and words (separate_softmax=False, plain prefix tuning) has no gate: "
                "set gating=False as well."
            )

    def _check_prompts(self) -> None:
        if self.parametrization == "key_value" and (self.prompt != "table" or self.prompts != "table"):
            raise ConfigError(
                f"learned keys and values have no prompts: leave out prompt={self.prompt!r} and "
                f"prompts={self.prompts!r}, or use parametrization='prompt'."
            )
        if self.prompt == "context" and self.prompts != "table":
            raise ConfigError("prompt='context' learns no prompts, so prompts='hyper' has nothing to make.")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(JsonConfig):
    """An adapter of several parts: prefixes of their own length, layers and gates, under one handle.

    Args:
        parts: {name: prefix}, in the order of their parameters; their additions to a layer's attention sum.
        context: registered name of the module that makes the context of all parts that take one; None has none, and a
            context is then given ready made.
        context_options: its settings.
        tuning: what the adapter changes in the host's own modules besides; None changes nothing. Built by the object's
            ``build(model, sites)``, see `zinit.adapter.tuning`.
    """

    parts: dict[str, PrefixConfig]
    context: str | None = None
    context_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    tuning: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.parts, dict) or not self.parts:
            raise ConfigError(f"parts must map at least one name to a prefix; got {self.parts!r}.")
        for name, part in self.parts.items():
            if not isinstance(name, str) or not name.isidentifier() or "__" in name:
                raise ConfigError(f"a part's name must be an identifier such as 'early'; got {name!r}.")
            if not isinstance(part, PrefixConfig):
                raise ConfigError(f"the part {name!r} must be a PrefixConfig; got {part!r}.")
            if len(self.parts) > 1 and not part.separate_softmax:
                raise ConfigError(
                    f"the part {name!r} shares the words' softmax (separate_softmax=False), which stands alone: leave "
                    f"the other parts out."
                )

    @classmethod
    def of(cls, config: PrefixConfig | AdapterConfig) -> AdapterConfig:
        """A single prefix as an adapter of one part."""
        return AdapterConfig(parts={"prefix": config}) if isinstance(config, PrefixConfig) else config

    def to_dict(self) -> dict[str, Any]:
        """Plain values, nested; the tuning's by its own ``to_dict``."""
        return {
            "parts": {name: part.to_dict() for name, part in self.parts.items()},
            "context": self.context,
            "context_options": dict(self.context_options),
            "tuning": None if self.tuning is None else self.tuning.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """From plain values, as `to_dict` makes them."""
        parts = values.get("parts") if isinstance(values, dict) else None
        if not isinstance(parts, dict):
            raise ConfigError(f"an adapter is built from named parts; got {values!r}.")
        read = {
            name: part if isinstance(part, PrefixConfig) else PrefixConfig.from_dict(part)
            for name, part in parts.items()
        }
        return super().from_dict({**values, "parts": read})


@dataclass(frozen=True, kw_only=True)
class TrainConfig(JsonConfig):
    """How to train. Defaults are the paper's Alpaca run where it states them, else ours.

    Args:
        epochs: passes over the training examples.
        steps: optimizer steps instead of epochs, if given.
        batch_size: examples per optimizer step, over all processes.
        micro_batch_size: examples per forward pass of one process; the rest accumulates.
        micro_batch_tokens: tokens per forward pass instead, padding included, if given: as many examples as fit.
        learning_rate: peak rate, applied as it stands (not scaled by the batch).
        warmup_epochs: linear warm-up, then half a cosine; None is the paper's share, 2 of 5 epochs of the run.
        warmup_steps: instead of ``warmup_epochs``, if given.
        min_learning_rate: what the cosine falls towards.
        weight_decay: AdamW's, on prompts and heads.
        decay_gates: whether gates decay too (the reference's code does it; zero-init attention does not need it).
        beta1: AdamW.
        beta2: AdamW.
        clip_norm: largest norm of the gradient; None does not clip (the reference does not).
        mixed_precision: autocast of the forward pass. A bfloat16 host needs none.
        gradient_checkpointing: recompute activations of the host in the backward pass.
        compile: pass the model through ``torch.compile``.
        evaluate_every: steps between evaluations of the held-out loss; 0 only at the end, None ten times a run.
        save_every: steps between resume checkpoints; 0 never, None ten times a run.
        workers: processes that prepare batches; 0 does it in the training process.
        tensorboard: also log to TensorBoard, in the run's folder.
        activation_cache: folder for what the frozen layers below the lowest adapted one give for each example, so
            that they run once and not every epoch; runs share it. For examples of one size (pictures); see
            `zinit.train.activation_cache`. None computes it anew each time.
    """

    epochs: float = 5
    steps: int | None = None
    batch_size: int = 64
    micro_batch_size: int = 8
    micro_batch_tokens: int | None = None
    learning_rate: float = 9e-3 * 64 / 256
    warmup_epochs: float | None = None
    warmup_steps: int | None = None
    min_learning_rate: float = 0.0
    weight_decay: float = 0.02
    decay_gates: bool = False
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float | None = 1.0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    compile: bool = False
    evaluate_every: int | None = None
    save_every: int | None = None
    workers: int = 0
    tensorboard: bool = False
    activation_cache: str | None = None

    def __post_init__(self) -> None:
        self._check_choices()
        for name in ("batch_size", "micro_batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1; got {value!r}.")
        for name in ("decay_gates", "gradient_checkpointing", "compile", "tensorboard"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false; got {getattr(self, name)!r}.")
        if self.activation_cache is not None and not (isinstance(self.activation_cache, str) and self.activation_cache):
            raise ConfigError(f"activation_cache must be a folder, or none; got {self.activation_cache!r}.")
        if not _is_finite(self.epochs) or self.epochs <= 0:
            raise ConfigError(f"epochs must be a number above 0; got {self.epochs!r}.")
        if self.steps == 0:
            raise ConfigError("steps must be a whole number of at least 1, or none for epochs; got 0.")
        if self.micro_batch_tokens == 0:
            raise ConfigError("micro_batch_tokens must be a whole number of at least 1, or none; got 0.")
        for name in ("steps", "micro_batch_tokens", "warmup_steps", "evaluate_every", "save_every", "workers"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ConfigError(f"{name} must be a whole number of at least 0; got {value!r}.")
        for name in ("learning_rate", "warmup_epochs", "min_learning_rate", "weight_decay"):
            value = getattr(self, name)
            if name == "warmup_epochs" and value is None:
                continue
            if not _is_finite(value) or value < 0:
                raise ConfigError(f"{name} must be a number of at least 0; got {value!r}.")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < 1:
                raise ConfigError(f"{name} must lie in [0, 1); got {value!r}.")
        if self.clip_norm is not None and not (_is_finite(self.clip_norm) and self.clip_norm > 0):
            raise ConfigError(f"clip_norm must be above 0, or null for no clipping; got {self.clip_norm!r}.")
        # Where one is in steps and the other in epochs, `zinit.train.loop.Plan` knows.
        if self.steps is not None and self.warmup_steps is not None and self.warmup_steps >= self.steps:
            raise ConfigError(f"warmup_steps ({self.warmup_steps}) must be fewer than steps ({self.steps}).")
        in_epochs = self.steps is None and self.warmup_steps is None
        if in_epochs and self.warmup_epochs is not None and self.warmup_epochs >= self.epochs:
            raise ConfigError(f"warmup_epochs ({self.warmup_epochs}) must be fewer than epochs ({self.epochs}).")
