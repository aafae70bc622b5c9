"""What a model's configuration tells before its weights are loaded: presets are fitted to it, wrong settings refused.

Presets are made for one model and one length of training. On a smaller model, or in a shorter try, what would be
refused is scaled: as large a part of the layers, the tokens there is room for, as large a part of the run for warm-up.
Without a preset the tokens, what prompts are and the rates are chosen for the model. What the user gave stays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from zinit.adapter.file import AdapterFile
from zinit.adapter.select import select_sites
from zinit.backbones import BACKBONES
from zinit.config import ROLES, AdapterConfig, PrefixConfig
from zinit.errors import BackboneError, ZinitError
from zinit.methods import METHODS
from zinit.methods.rates import ZERO_INIT
from zinit.models.loading import load_on_meta
from zinit.models.room import check_positions, positions
from zinit.runs.build import demo_model
from zinit.runs.config import PARTS, RunConfig
from zinit.runs.presets import PROMPTS, Preset
from zinit.tasks import TASKS
from zinit.train.config import TrainConfig
from zinit.train.plan import Draws, Plan, rates_by_role

if TYPE_CHECKING:
    from torch import nn

    from zinit.backbones.base import AttentionSite
    from zinit.methods.base import Method
    from zinit.tasks.base import Task

# Found on models of 22 to 500 million numbers, see docs/recipes.md; above SMALL it is the method's own rate.
LARGEST, SMALL = 3e-2, 1_000_000_000
STARTS: dict[str, Any] = {"parametrization": "key_value", "init_std": 0.02}  # of models of texts
FOUND = {
    "a language model": {"source": 0.1, "tuning": 0.01},
    "an encoder": {"gates": 10.0, "source": 0.1, "tuning": 0.1, "head": 0.3},
}
OF_GATES = ("gate", "gate_per", "gate_init")  # play no part where there is no gate
OWN_LOADERS = "zinit.models."  # how their addresses begin; what the loader of another package makes is not known before


@dataclass(frozen=True, kw_only=True)
class Preview:
    """A model without its weights.

    Attributes:
        model: on the meta device.
        sites: its attention modules.
    """

    model: nn.Module
    sites: list[AttentionSite]

    @classmethod
    def of(cls, config: RunConfig) -> Preview | None:
        """The run's model; None where its configuration alone does not make it: loading says what is wrong."""
        task: type[Task] = TASKS.get(config.task)
        if not getattr(task, "loader", "").startswith(OWN_LOADERS):
            return None
        source = demo_model(config.backbone) if config.model is None else config.model
        try:
            model = load_on_meta(source, revision=config.revision)
            return cls(model=model, sites=BACKBONES.get(config.backbone).sites(model))
        except Exception:  # of a backbone that looks at weights, say; whatever it is, it is no fault of the settings
            return None

    def towers(self, names: tuple[str, ...] | None) -> list[list[AttentionSite]]:
        """The attention modules of each tower that is named, None: of every one."""
        chosen = select_sites(self.model, self.sites, PrefixConfig(towers=names))
        return [[site for site in chosen if site.tower == tower] for tower in dict.fromkeys(s.tower for s in chosen)]


def settle(config: RunConfig, preset: str | None) -> tuple[RunConfig, list[str]]:
    """The settings of a run on its model, whose weights are not loaded for it.

    Args:
        config: the run's settings.
        preset: as `zinit.runs.settings.resolve` returned it; a plain name leaves the settings as they are.

    Returns:
        The settings, and what was scaled or chosen, in words.

    Raises:
        BackboneError, ConfigError: if the model lacks the layers, towers or positions that are asked for.
    """
    preview = Preview.of(config)
    notes = list(preset.notes) if isinstance(preset, Preset) else []
    if preview is None:
        return config, notes
    if isinstance(preset, Preset):
        config, scaled = fit_to_model(config, preset, preview)
        notes += scaled
    config, chosen = fit_start(config, preset, preview)
    check_settings(config, preview)
    return config, [*notes, *chosen]


def fit_start(config: RunConfig, preset: str | None, preview: Preview) -> tuple[RunConfig, list[str]]:
    """Keys and values of their own, where neither a preset nor the user says what is learned, or at which rates.

    They were found together. A run that goes on from another's weights has what is learned there.

    Args:
        config: the run's settings.
        preset: as `zinit.runs.settings.resolve` returned it.
        preview: of the run's model.

    Returns:
        The settings, and what was chosen, in words.
    """
    free = _chooses_rates(config, preset, preview.model) and isinstance(preset, Preset) and preset.untouched >= PROMPTS
    if not (free and TASKS.get(config.task).reads_texts and _has_plain_prompts(config)):
        return config, []
    if config.warm_start is not None and not _learns_keys(config.warm_start):
        return config, []
    said = ", ".join(f"prefix.{name}={value}" for name, value in STARTS.items())
    note = f"{said}: what was good on models of texts of under a billion numbers (docs/recipes.md)"
    return replace(config, prefix=replace(config.prefix, **STARTS)), [note]


def _has_plain_prompts(config: RunConfig) -> bool:
    """Whether the method learns one table of prompts a layer."""
    if config.parts:
        return False
    parts = METHODS.get(config.method)(config.method_options).attached(config.adapter()).parts.values()
    return bool(parts) and all(part.prompt == part.prompts == "table" for part in parts)


def _learns_keys(source: str) -> bool:
    """Whether an adapter has keys and values of its own; what is wrong with it is said when it is taken."""
    try:
        parts = AdapterConfig.of(AdapterFile.read(source).config).parts.values()
    except ZinitError:
        return False
    return any(part.parametrization == STARTS["parametrization"] for part in parts)


def fit_to_model(config: RunConfig, preset: Preset, preview: Preview) -> tuple[RunConfig, list[str]]:
    """Scales what a preset asks of a larger model than this one.

    Args:
        config: the run's settings.
        preset: where they come from.
        preview: of the run's model.

    Returns:
        The settings, and what was scaled, in words.
    """
    notes, layers = [], config.prefix.layers
    if "prefix.layers" in preset.untouched and isinstance(layers, int) and preset.model_layers:
        count = min(map(len, preview.towers(config.prefix.towers)))
        if layers > count:
            scaled = max(1, round(count * layers / preset.model_layers))
            config = replace(config, prefix=replace(config.prefix, layers=scaled))
            notes.append(f"prefix.layers={scaled} of {count} (the preset: {layers} of {preset.model_layers})")
    room, longest = positions(preview.model), getattr(config.options, "max_length", 0)
    if "task.max_length" in preset.untouched and room is not None and longest > room:
        config = replace(config, options=replace(config.options, max_length=room))
        of = f"the preset: {longest}" if preset else f"usually {longest}"
        notes.append(f"task.max_length={room}, which the model has room for ({of})")
    return config, notes


def fit_rates(config: RunConfig, preset: str | None, task: Task) -> tuple[TrainConfig, list[str]]:
    """The rates that were found for models of this kind and size, where neither a preset nor the user gives any.

    Args:
        config: the run's settings.
        preset: as `zinit.runs.settings.resolve` returned it.
        task: on its model.

    Returns:
        The loop's settings, and what was chosen, in words.
    """
    kind = "a language model" if task.generates else "an encoder" if "head" in rates_by_role(task, config.train) else ""
    if not kind or not _chooses_rates(config, preset, task.model):
        return config.train, []
    found = _found(kind, config)
    trained = {role: rate for role, rate in found.items() if role in rates_by_role(task, config.train)}
    rates = replace(config.train.rates, **trained)
    said = [f"train.learning_rate={LARGEST}", *(f"train.rates.{role}={rate:g}" for role, rate in trained.items())]
    note = f"{', '.join(said)}: what was good on {kind} of under a billion numbers (docs/recipes.md)"
    return replace(config.train, learning_rate=LARGEST, rates=rates), [note]


def _chooses_rates(config: RunConfig, preset: str | None, model: nn.Module) -> bool:
    free = isinstance(preset, Preset) and not preset and {"train.learning_rate", "train.rates"} <= preset.untouched
    return free and _is_small(model) and METHODS.fact(config.method, "default_rates") == ZERO_INIT


def _is_small(model: nn.Module) -> bool:
    return sum(parameter.numel() for parameter in model.parameters()) < SMALL


def _found(kind: str, config: RunConfig) -> dict[str, float]:
    """Factors by role. Gates by query of a language model that are too fast end above the loss before training."""
    adapter = METHODS.get(config.method)(config.method_options).attached(config.adapter())
    parts = adapter.parts.values() if adapter is not None else ()
    own, found = all(part.parametrization == "key_value" for part in parts), dict(FOUND[kind])
    if kind == "a language model":
        found["gates"] = (0.1 if any(part.gate == "query" for part in parts) else 1.0) * (10 if own else 1)
    if own and any(not part.separate_softmax for part in parts):  # what is learned competes with the words: faster
        found |= {"prompts": 3.0, "gates": 0.3 * found["gates"]}
    return dict(sorted(found.items(), key=lambda factor: ROLES.index(factor[0])))


def starting_options(config: RunConfig, preset: str | None) -> tuple[str, ...]:
    """What `settle` and `fit_rates` choose for a small model of texts, as options: a search begins there too.

    Args:
        config: the run's settings.
        preset: as `zinit.runs.settings.resolve` returned it.
    """
    task, preview = TASKS.get(config.task), Preview.of(config)
    if preview is None:
        return ()
    started, chosen = fit_start(config, preset, preview)
    said = [f"prefix.{name}={value}" for name, value in STARTS.items()] if chosen else []
    kind = "a language model" if task.generates else "an encoder"
    if task.reads_texts and _chooses_rates(config, preset, preview.model):
        adapter = METHODS.get(config.method)(config.method_options).attached(config.adapter())
        source = adapter.context is not None or any(part.prompts != "table" for part in adapter.parts.values())
        trained = {"gates": True, "prompts": True, "head": True, "tuning": adapter.tuning is not None, "source": source}
        said += [f"train.learning_rate={LARGEST}"]
        said += [f"train.rates.{role}={rate:g}" for role, rate in _found(kind, started).items() if trained[role]]
    return tuple(said)


def fit_warmup(train: TrainConfig, preset: str | None, task: Task, seed: int) -> tuple[TrainConfig, list[str]]:
    """Scales a preset's warm-up in epochs where the user's ``train.steps`` are not more than it.

    Args:
        train: the loop's settings.
        preset: as `zinit.runs.settings.resolve` returned it.
        task: whose first stream counts the epochs.
        seed: of the run.

    Returns:
        The settings, and what was scaled, in words.
    """
    own = isinstance(preset, Preset) and "train.warmup_epochs" in preset.untouched
    stream = next((stream for stream in task.streams() if stream.ratio and len(stream)), None)
    if not own or train.steps is None or not train.warmup_epochs or stream is None:
        return train, []
    if round(train.warmup_epochs * Draws(train, stream, seed).steps_per_epoch) < train.steps:
        return train, []
    steps = int(train.steps * train.warmup_epochs / train.epochs)
    note = f"train.warmup_steps={steps} of {train.steps} (the preset: {train.warmup_epochs} of {train.epochs} epochs)"
    return replace(train, warmup_epochs=None, warmup_steps=steps), [note]


def picked(config: RunConfig, task: Task) -> str:
    """What a run trains and how, in words: what was asked for, and what was left to the method and the model."""
    parts = {} if task.handle is None else task.handle.parts
    layers = 0 if task.handle is None else len(task.handle.state.sites)
    plan, rates = Plan.of(task, config.train, config.seed), rates_by_role(task, config.train)
    longest = getattr(config.options, "max_length", None)
    return "; ".join(
        [
            *(f"{_learned(part.config)} in {len(part.prefixes)} of {layers} layers" for part in parts.values()),
            *(f"{role}: {own['numbers']:,} numbers at rate {own['rate']:.3g}" for role, own in rates.items()),
            f"{plan.steps} steps, {plan.warmup} of them warm-up",
            *([] if longest is None else [f"at most {longest} tokens"]),
            *(f"{setting} plays no part in {config.method}" for setting in overruled(config)),
        ]
    )


def overruled(config: RunConfig) -> list[str]:
    """Settings of the prefix that say something else than the default, which the method decides by itself."""
    asked, method = config.adapter(), METHODS.get(config.method)(config.method_options)
    made: AdapterConfig | None = method.attached(asked)
    found: list[str] = []
    if made is None:
        return found
    for name, part in asked.parts.items():
        own = made.parts.get(name)
        start = f"{PARTS}.{name}" if config.parts else "prefix"
        for setting, value in part.to_dict().items():
            kept = own is not None and getattr(own, setting) == getattr(part, setting)
            if own is not None and not own.gating and setting in OF_GATES:
                kept = False
            if not kept and getattr(part, setting) != getattr(PrefixConfig(), setting):
                found.append(f"{start}.{setting}={value}")
    return found


def _learned(part: PrefixConfig) -> str:
    return "matrices" if part.parametrization == "matrix" else f"{part.length} prompts"


def check_settings(config: RunConfig, preview: Preview) -> None:
    """The model has the layers, the towers and the positions that the settings ask for.

    Raises:
        BackboneError, ConfigError: if not.
    """
    method: Method = METHODS.get(config.method)(config.method_options)
    adapter = method.attached(config.adapter())
    for part in () if adapter is None else adapter.parts.values():
        _check_sites(preview, part)
    check_positions(preview.model, getattr(config.options, "max_length", 0))


def _check_sites(preview: Preview, part: PrefixConfig) -> None:
    """Refuses where no tower has the layers: the task may load a part of what the configuration describes."""
    for sites in preview.towers(part.towers):
        try:
            select_sites(preview.model, sites, replace(part, towers=None))
        except BackboneError:
            continue
        return
    select_sites(preview.model, preview.sites, part)
