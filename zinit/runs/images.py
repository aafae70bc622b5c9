"""The images of a run: which encoder makes their features, and when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from zinit.adapter.encoding import Encoder, library_of, load_feature_encoder
from zinit.adapter.sources import ContextSource
from zinit.config import setting_names
from zinit.demo import clip_path
from zinit.encoders.cache import FeatureCache, cache_root
from zinit.encoders.retrieval import Retrieval, RetrievalConfig
from zinit.errors import ConfigError
from zinit.runs.config import RunConfig
from zinit.runs.options import parse_options
from zinit.train.events import Encoded, Listener, Notice
from zinit.train.loop import ignore

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from zinit.adapter.handle import Handle
    from zinit.tasks.base import Task


def check_encoder(config: RunConfig) -> None:
    """What can be said of a run's encoder before anything is loaded.

    Raises:
        ConfigError: if what is named cannot be one.
    """
    own = config.encoder
    if config.context is not None and own.source is not None:
        library_of(own.source).check(own.source, revision=own.revision, bgr=own.bgr)


def load_encoder(config: RunConfig, *, beside: nn.Module) -> Encoder | None:
    """What makes features of images for the run's adapter; None where it takes none.

    Raises:
        ConfigError: if nobody says which encoder.
    """
    own = config.encoder
    if config.context is None:
        return None
    source = clip_path() if own.source is None and config.model is None else own.source
    if source is None:
        raise ConfigError(
            f"the method {config.method!r} needs a model that makes features of images: --encoder FOLDER_OR_HUB_ID, "
            f"such as openai/clip-vit-large-patch14."
        )
    return load_feature_encoder(source, beside=beside, revision=own.revision, bgr=own.bgr)


def feature_cache(config: RunConfig, handle: Handle | None) -> FeatureCache | None:
    """Features of images for an adapter; None if it takes none.

    Args:
        config: of the run.
        handle: the adapter.
    """
    source = None if handle is None else handle.shared.get("context")
    if handle is None or handle.encoder_identity is None or not isinstance(source, ContextSource):
        return None
    root = cache_root(config.encoder.cache)
    return FeatureCache(handle.get_encoder(), source, root=root, limit=config.encoder.cache_limit)


def open_retrieval(index: str, options: Sequence[str]) -> Retrieval:
    """Cache retrieval as the command line asks for it; whether it fits an adapter is its ``check``.

    Args:
        index: folder of the index.
        options: ``retrieval.weight=0.5`` and so on; see `zinit.encoders.retrieval.RetrievalConfig`.

    Raises:
        ConfigError: if an option is none of retrieval.
        DataError: if there is no index.
    """
    known = [f"{RetrievalConfig.called}.{name}" for name in setting_names(RetrievalConfig)]
    values = parse_options(options, known).get(RetrievalConfig.called, {})
    return Retrieval.open(index, RetrievalConfig.from_dict(values))


def mix_features(task: Task, mixing: Retrieval) -> None:
    """A task's adapter sees features of its examples mixed with an index from now on.

    Raises:
        ConfigError: if the index is not for the adapter, or no example has any features.
    """
    mixing.check(task.handle)
    if task.cached_features is None or not task.image_sources():
        raise ConfigError(f"the index {mixing.folder} mixes what an adapter sees, and no example shows it anything.")
    task.cached_features.retrieval = mixing


def freeze_what_only_images_use(task: Task) -> None:
    """Without images no gradient would ever come to it, and data parallelism would wait for one.

    Args:
        task: with its examples.
    """
    handle = task.handle
    if handle is None or "context" not in handle.shared or task.image_sources():
        return
    alone = [part for part in handle.parts.values() if part.config.prompt == "context"]
    for module in (handle.shared["context"], *(prefix for part in alone for prefix in part.prefixes.values())):
        module.requires_grad_(False)


def encode_images(task: Task, accelerator: Accelerator, on_event: Listener = ignore) -> None:
    """Runs the encoder over the images of a task's examples, as far as nobody has; the processes divide them.

    Args:
        task: on its device.
        accelerator: the run's.
        on_event: gets notices and progress.
    """
    images, cache = task.image_sources(), task.cached_features
    if not images or cache is None:
        return
    cache.encoder.to(next(task.model.parameters()).device)
    rank, world = accelerator.process_index, accelerator.num_processes
    cache.fill(
        images,
        rank=rank,
        world=world,
        progress=lambda done, of: on_event(Encoded(done, of)),
        tell=lambda text: on_event(Notice(text)),
    )
    accelerator.wait_for_everyone()
    cache.refresh()
    cache.encoder.to("cpu")
