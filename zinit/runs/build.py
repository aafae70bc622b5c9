"""The parts of a run: its model, adapted, and the task on it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinit.adapter.fingerprint import fingerprint
from zinit.adapter.handle import Handle
from zinit.backbones import BACKBONES
from zinit.errors import BackboneError, CheckpointError, ConfigError
from zinit.experts.base import Expert, make_expert
from zinit.files import is_file
from zinit.methods import METHODS
from zinit.methods.base import ApplyContext, Method, apply_method
from zinit.models.identity import difference, identify
from zinit.models.offload import move
from zinit.models.several import LoadedModel, load_models
from zinit.registry import import_object
from zinit.runs.captioner import RunCaptioner
from zinit.runs.config import RunConfig
from zinit.runs.directory import SavedRun
from zinit.runs.images import feature_cache, freeze_what_only_images_use, load_encoder
from zinit.runs.record import RECORD, Record
from zinit.tasks import TASKS
from zinit.tasks.base import DataInputs, TaskInputs, load_host, make_task

if TYPE_CHECKING:
    import torch

    from zinit.methods.base import Adapted
    from zinit.models.loading import Loading
    from zinit.tasks.base import Task


@dataclass(kw_only=True)
class Built:
    """A run's parts.

    Attributes:
        method: how the model is adapted.
        adapted: the model with what the method added.
        processor: its tokenizer or the like.
        key_probe: a sample of the frozen model's weights; None for a model that no backbone knows.
        identity: what tells the model from another, before the method changed it; its sample of weights is of the
            attention modules, which come from the file (a head may start at random).
        models: the further models of the task, by name.
        identities: what tells each of them from another; see `zinit.models.identity`.
    """

    method: Method
    adapted: Adapted
    processor: Any
    key_probe: list[float] | None
    identity: dict[str, Any]
    models: dict[str, LoadedModel]
    identities: dict[str, dict[str, Any]]


def build_model(
    config: RunConfig, device: torch.device, *, load_to: torch.device | str | None = None, saved: Path | None = None
) -> Built:
    """The task's models, one of them adapted.

    Args:
        config: the run's settings.
        device: that it will run on; decides the dtype "auto".
        load_to: where its weights are read to; default: ``device``.
        saved: a finished run's folder to load the prefix from; None attaches a fresh one.
    """
    from torch import nn

    method: Method = METHODS.get(config.method)(config.method_options)
    task: type[Task] = TASKS.get(config.task)
    loading = _loading(config, method, load_to or device, device)
    model, processor = load_base(config, device, load_to=load_to)
    models = load_models(task.further_models(config.options), **loading)
    identities = {name: identify(loaded.model) for name, loaded in models.items()}
    try:
        sites = BACKBONES.get(config.backbone).sites(model)
        key_probe = fingerprint(model, sites)["key_probe"]
    except BackboneError:
        sites, key_probe = [], None  # a method without attention sites may still be used
    attention = nn.ModuleList([site.module for site in sites])
    identity = {**identify(model), "weights": identify(attention)["weights"]}
    encoder = load_encoder(config, beside=model)
    context = ApplyContext(
        prefix=config.prefix,
        adapter=config.adapter(),
        backbone=config.backbone,
        seed=config.seed,
        saved=saved,
        models={name: loaded.model for name, loaded in models.items()},
        encoder=encoder,
    )
    adapted = apply_method(method, model, context)
    if adapted.handle is not None and adapted.handle.encoder_identity is not None:
        identities["encoder"] = {**adapted.handle.encoder_identity, "source": ""}  # where it lies may change
    return Built(
        method=method,
        adapted=adapted,
        processor=processor,
        key_probe=key_probe,
        identity=identity,
        models=models,
        identities=identities,
    )


def load_base(config: RunConfig, device: torch.device, *, load_to: torch.device | str | None = None) -> tuple[Any, Any]:
    """A run's model as its method finds it, and what prepares its inputs.

    Args:
        config: the run's settings.
        device: that it will run on; decides the dtype "auto".
        load_to: where its weights are read to; default: ``device``.
    """
    method: Method = METHODS.get(config.method)(config.method_options)
    source = demo_model(config.backbone) if config.model is None else config.model
    loading = {**_loading(config, method, load_to or device, device), "revision": config.revision}
    return load_host(TASKS.get(config.task), source, trains=method.trains_host, **loading)


def _loading(config: RunConfig, method: Method, load_to: torch.device | str, device: torch.device) -> Loading:
    import torch

    low = device.type == "cuda" and not method.trains_host
    automatic = torch.bfloat16 if low else torch.float32
    dtype = automatic if config.dtype == "auto" else getattr(torch, config.dtype)
    return {"dtype": dtype, "device": load_to, "quantize": config.quantize}


def check_models(directory: str | Path, record: Record, built: Built) -> None:
    """The task's further models are those that a run was made with.

    Args:
        directory: of the run, for messages.
        record: of the run.
        built: the models as loaded now.

    Raises:
        CheckpointError: naming the model and what differs.
    """
    recorded = record.models
    for name in sorted(recorded.keys() | built.identities.keys()):
        if name not in recorded or name not in built.identities:
            where = "the run was made with" if name in recorded else "the task now has"
            raise CheckpointError(f"the run in {directory} cannot be used: only {where} a model {name!r}.")
        if found := difference(recorded[name], built.identities[name]):
            raise CheckpointError(
                f"the run in {directory} was made with another model {name!r}: {found}. Restore the model, or start a "
                f"new run in another folder."
            )


def read_data(
    config: RunConfig,
    *,
    labels: list[str] | None = None,
    train: bool = True,
    device: torch.device | str = "cpu",
) -> Any:
    """The task's examples, as far as they can be read without its model: what is wrong with them is said first.

    Args:
        config: the run's settings.
        labels: class names of a finished run.
        train: False leaves the training examples unread.
        device: for the models of experts, which are gone before the run's own is loaded.

    Raises:
        DataError: if they cannot be used.
    """
    task: type[Task] = TASKS.get(config.task)
    expert = partial(run_expert, device=device)
    inputs = DataInputs(data=config.data, seed=config.seed, train=train, labels=labels, make_expert=expert)
    return task.read_data(inputs, config.options)


def build_task(
    config: RunConfig, built: Built, *, labels: list[str] | None = None, train: bool = True, examples: Any = None
) -> Task:
    """The task on a built model.

    Args:
        config: the run's settings.
        built: see `build_model`.
        labels: class names of a finished run.
        train: False leaves the training examples unread.
        examples: what `read_data` gave for the same settings, labels and ``train``.
    """
    inputs = TaskInputs(
        model=built.adapted.model,
        processor=built.processor,
        handle=built.adapted.handle,
        data=config.data,
        seed=config.seed,
        train=train,
        labels=labels,
        examples=examples,
        models=built.models,
        features=feature_cache(config, built.adapted.handle),
    )
    task = make_task(TASKS.get(config.task), inputs, config.options)
    freeze_what_only_images_use(task)
    return task


def demo_model(backbone: str) -> Path:
    """The folder of a backbone's embedded model.

    Raises:
        ConfigError: if it has none.
    """
    where = BACKBONES.get(backbone).demo_model
    if not where:
        raise ConfigError(f"the backbone {backbone!r} has no embedded demo: pass --model and --data.")
    return import_object(where)()


def run_expert(words: str, *, device: torch.device | str) -> Expert:
    """An expert; "caption:RUN" is a run of the task caption.

    Args:
        words: see `zinit.experts.base.make_expert`.
        device: for its models.

    Raises:
        ConfigError: if there is none, or the run is of another task.
        CheckpointError: if nothing of the run was saved yet.
    """
    name, _, folder = words.partition(":")
    if name != RunCaptioner.name or not is_file(Path(folder) / RECORD):
        return make_expert(words, device=device)
    import torch

    config, model, tokenizer, handle = load_run(folder, torch.device(device))
    return RunCaptioner(config, model, tokenizer, handle)


def load_saved(run: SavedRun, device: torch.device, *, base: bool = False) -> Built:
    """A run's model, trained, where it runs, and its tokenizer.

    Args:
        run: of a task that generates text.
        device: that it will run on.
        base: leave what was trained beside the prefix as it began: full fine-tuning cannot be switched off.

    Raises:
        CheckpointError: if the weights do not fit.
    """
    load_to = "cpu" if run.config.offload else device
    built = build_model(run.config, device, load_to=load_to, saved=run.adapter)
    check_models(run.folder, run.record, built)
    if not base:
        run.load_into_model(built.adapted.model)
    move(built.adapted.model, device, offload=run.config.offload)
    return built


def load_run(directory: str | Path, device: torch.device) -> tuple[RunConfig, Any, Any, Handle]:
    """As `load_saved`, for runs with a prefix: settings, model, tokenizer and prefix.

    Raises:
        ConfigError: if the run's method has none.
    """
    run = SavedRun.read(directory)
    built = load_saved(run, device)
    if built.adapted.handle is None:
        raise ConfigError(f"the run in {directory} was made by the method {run.config.method!r}, which has no prefix.")
    return run.config, built.adapted.model, built.processor, built.adapted.handle
