"""What is served: a run, one of its checkpoints, or an adapter alone."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory

from torch import nn

from zinit.adapter.encoding import Encoder
from zinit.adapter.file import DESCRIPTION
from zinit.errors import ConfigError
from zinit.files import is_file
from zinit.methods import METHODS
from zinit.methods.base import ApplyContext, Method, apply_method
from zinit.runs.config import RunConfig
from zinit.runs.directory import SavedRun
from zinit.runs.record import RECORD, split_checkpoint
from zinit.tasks import TASKS


@dataclass(frozen=True, kw_only=True)
class Source:
    """A run, one of its checkpoints, or a folder or Hub repository with an adapter alone.

    Attributes:
        where: the folder or Hub id.
        saved: the run, and whose weights of it; None where there is no run.
    """

    where: str
    saved: SavedRun | None

    @classmethod
    def read(cls, where: str) -> Source:
        """Looks what there is. Of a run that has not finished the last checkpoint is taken.

        Raises:
            CheckpointError: if nothing of a run was saved yet, or a checkpoint is not all of its adapter.
            ConfigError: if it has no prefix, or generates no text.
        """
        where = os.path.expanduser(where)  # that of a request or a deployment file went through no shell
        if not is_file(split_checkpoint(where)[0] / RECORD):
            return cls(where=where, saved=None)
        saved = SavedRun.read(where)
        if not TASKS.get(saved.config.task).generates:
            raise ConfigError(f"the run in {where} is of the task {saved.config.task!r}, which does not generate text.")
        if not _has_prefix(saved):
            raise ConfigError(
                f"the run in {where} was made by the method {saved.config.method!r}, which has no prefix. Only runs "
                f"with a prefix can be served: they share one base. Ask it with zinit chat {shlex.quote(where)}, or "
                f"zinit generate {shlex.quote(where)} --data FILE --output FILE.jsonl."
            )
        return cls(where=where, saved=saved)

    @property
    def run(self) -> RunConfig | None:
        """The run's settings; None where there is no run."""
        return None if self.saved is None else self.saved.config

    @property
    def note(self) -> str:
        """Whose weights they are, where they are not those of a run's end."""
        return "" if self.saved is None else self.saved.note

    @contextmanager
    def adapter(self, base: nn.Module, encoder: Encoder | None) -> Iterator[str]:
        """Where the adapter can be loaded from; a checkpoint's is written to a folder for so long.

        Args:
            base: takes the adapter for a moment, under the name that a checkpoint knows it by.
            encoder: of the run.

        Raises:
            CheckpointError: if the checkpoint does not fit the base, or is damaged.
        """
        if self.saved is None or self.saved.checkpoint is None:
            yield self.where
            return
        config, record = self.saved.config, self.saved.record
        context = ApplyContext(
            prefix=config.prefix,
            adapter=config.adapter(),
            backbone=config.backbone,
            seed=config.seed,
            encoder=encoder,
        )
        handle = apply_method(_method(config), base, context).handle
        assert handle is not None
        try:
            self.saved.load_into_model(base)
            file = handle.to_file()
        finally:
            handle.detach()
        trained_on = {**file.fingerprint, "key_probe": record.key_probe}  # loading compares it with the base
        with TemporaryDirectory() as folder:
            replace(file, fingerprint=trained_on, encoder=record.models.get("encoder", file.encoder)).write(folder)
            yield folder


def _has_prefix(saved: SavedRun) -> bool:
    if saved.checkpoint is None:
        return is_file(saved.folder / DESCRIPTION)
    return _method(saved.config).attached(saved.config.adapter()) is not None


def _method(config: RunConfig) -> Method:
    return METHODS.get(config.method)(config.method_options)
