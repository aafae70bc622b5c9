"""Settings of training, and the factors on its rate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Self

from zinit.config import HEAD, ROLES, JsonConfig, setting_names
from zinit.errors import ConfigError
from zinit.registry import did_you_mean
from zinit.validation import Folder, Name, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Rate, Workers


@dataclass(frozen=True, kw_only=True)
class RatesConfig(JsonConfig):
    """Factors on `TrainConfig.learning_rate`, by the role of what trains; 0 leaves it as it is.

    A table inside holds the factors of one group of parameters, which count instead: ``[train.rates.visual]``, or
    ``train.rates.visual.gates``. See `zinit.tasks.base.Task.groups`.

    Args:
        gates: of prefixes.
        prompts: of prefixes: tables, keys and values, networks that make them.
        source: the module that makes a context.
        tuning: biases, scales and norms.
        weights: what another method trains in the model: low-rank updates, biases, all of it. None is the head's.
        head: of the task, and everything else.
        groups: {group: {role: factor}}.
    """

    gates: NonNegativeFloat = 1.0
    prompts: NonNegativeFloat = 1.0
    source: NonNegativeFloat = 1.0
    tuning: NonNegativeFloat = 1.0
    weights: NonNegativeFloat | None = None
    head: NonNegativeFloat = 1.0
    groups: dict[str, dict[str, NonNegativeFloat]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for group, factors in self.groups.items():
            for role in factors:
                if role not in ROLES:
                    raise ConfigError(f"the group {group!r} has no setting {role!r}.{did_you_mean(role, ROLES)}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """As `JsonConfig.from_dict`; a table under a name of its own is a group's."""
        if not isinstance(values, dict):
            return super().from_dict(values)
        known = setting_names(cls)
        groups = {name: table for name, table in values.items() if isinstance(table, dict) and name not in known}
        own = {name: value for name, value in values.items() if name not in groups}
        return super().from_dict(own | {"groups": own.get("groups", {}) | groups} if groups else own)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, each group's table under its name."""
        own = {role: getattr(self, role) for role in ROLES}
        return {**{role: factor for role, factor in own.items() if factor is not None}, **self.groups}

    def factor(self, group: str, role: str) -> float:
        """The factor of a role in a group; 1 for roles that only a method knows."""
        own = getattr(self, role) if role in ROLES else 1.0
        return self.groups.get(group, {}).get(role, self.factor(group, HEAD) if own is None else own)


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
        rates: factors on the rate, by the role of what trains.
        weight_decay: AdamW's, on prompts and heads.
        decay_gates: whether gates decay too (the reference's code does it; zero-init attention does not need it).
        beta1: AdamW.
        beta2: AdamW.
        clip_norm: largest norm of the gradient; None does not clip (the reference does not).
        mixed_precision: autocast of the forward pass. A bfloat16 host needs none.
        gradient_checkpointing: recompute activations of the host in the backward pass.
        compile: pass the model through ``torch.compile``.
        evaluate_every: steps between evaluations of the held-out loss; 0 only at the end, None ten times a run.
        keep_best: a figure of the task's evaluation, such as "loss" or "accuracy": the run ends with the weights whose
            figure was best. All figures are then measured at each evaluation. None ends with the last weights.
        patience: with ``keep_best``: training ends after so many evaluations in a row without a better figure.
        save_every: steps between resume checkpoints; 0 never, None ten times a run.
        workers: processes that prepare batches; 0 does it in the training process.
        tracker: also log to "tensorboard" (in the run's folder), "wandb", "trackio" or "mlflow", whose own
            environment variables set them up.
        activation_cache: folder for the output of the frozen layers below the lowest adapted one, one per training
            example, so that they run once and not every epoch; runs share it. For examples of one size (images); see
            `zinit.train.activation_cache`. None computes it anew each time.
    """

    epochs: PositiveFloat = 5
    steps: PositiveInt | None = None
    batch_size: PositiveInt = 64
    micro_batch_size: PositiveInt = 8
    micro_batch_tokens: PositiveInt | None = None
    learning_rate: NonNegativeFloat = 9e-3 * 64 / 256
    warmup_epochs: NonNegativeFloat | None = None
    warmup_steps: NonNegativeInt | None = None
    min_learning_rate: NonNegativeFloat = 0.0
    rates: RatesConfig = field(default_factory=RatesConfig)
    weight_decay: NonNegativeFloat = 0.02
    decay_gates: bool = False
    beta1: Rate = 0.9
    beta2: Rate = 0.95
    clip_norm: PositiveFloat | None = 1.0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    compile: bool = False
    evaluate_every: NonNegativeInt | None = None
    keep_best: Name | None = None
    patience: PositiveInt | None = None
    save_every: NonNegativeInt | None = None
    workers: Workers = 0
    tracker: Literal["tensorboard", "wandb", "trackio", "mlflow"] | None = None
    activation_cache: Folder | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        # Where one is in steps and the other in epochs, `zinit.train.loop.Plan` knows.
        if self.steps is not None and self.warmup_steps is not None and self.warmup_steps >= self.steps:
            raise ConfigError(f"warmup_steps ({self.warmup_steps}) must be fewer than steps ({self.steps}).")
        if self.patience is not None and self.keep_best is None:
            raise ConfigError("patience needs a figure to look at: -o train.keep_best=loss, or another figure.")
        if self.keep_best is not None and self.evaluate_every == 0:
            raise ConfigError("keep_best chooses among evaluations: leave out evaluate_every, or give it steps.")
        in_epochs = self.steps is None and self.warmup_steps is None
        if in_epochs and self.warmup_epochs is not None and self.warmup_epochs >= self.epochs:
            raise ConfigError(f"warmup_epochs ({self.warmup_epochs}) must be fewer than epochs ({self.epochs}).")
