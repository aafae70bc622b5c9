"""zinit: zero-init attention for any pretrained Transformer.

Names are resolved when first used, so that ``import zinit`` loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_WHERE = {
    "AdapterConfig": "zinit.config",
    "PrefixConfig": "zinit.config",
    "TuningConfig": "zinit.config",
    "Context": "zinit.prefix",
    "in_scope": "zinit.adapter.scopes",
    "ZeroGatedPrefix": "zinit.prefix",
    "Handle": "zinit.adapter.handle",
    "attach": "zinit.adapter.attach",
    "load": "zinit.adapter.attach",
    "from_pretrained": "zinit.models.pretrained",
    "get_handle": "zinit.adapter.attach",
    "ZinitCallback": "zinit.models.trainer",
    "import_adapter": "zinit.interop.importing",
    "AttentionSite": "zinit.backbones.base",
    "Task": "zinit.tasks.base",
    "ZinitError": "zinit.errors",
    "ConfigError": "zinit.errors",
    "BackboneError": "zinit.errors",
    "CheckpointError": "zinit.errors",
    "DataError": "zinit.errors",
}

if TYPE_CHECKING:
    from zinit.adapter.attach import attach, get_handle, load
    from zinit.adapter.handle import Handle
    from zinit.adapter.scopes import in_scope
    from zinit.backbones.base import AttentionSite
    from zinit.config import AdapterConfig, PrefixConfig, TuningConfig
    from zinit.errors import BackboneError, CheckpointError, ConfigError, DataError, ZinitError
    from zinit.interop.importing import import_adapter
    from zinit.models.pretrained import from_pretrained
    from zinit.models.trainer import ZinitCallback
    from zinit.prefix import Context, ZeroGatedPrefix
    from zinit.tasks.base import Task

__all__ = [
    "AdapterConfig",
    "AttentionSite",
    "BackboneError",
    "CheckpointError",
    "ConfigError",
    "Context",
    "DataError",
    "Handle",
    "PrefixConfig",
    "Task",
    "TuningConfig",
    "ZeroGatedPrefix",
    "ZinitCallback",
    "ZinitError",
    "attach",
    "from_pretrained",
    "get_handle",
    "import_adapter",
    "in_scope",
    "load",
    "register_backbone",
    "register_method",
    "register_task",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'zinit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def register_backbone(name: str, where: str) -> None:
    """Adds a backbone: ``zinit.register_backbone("mine", "my_package.backbone:MINE")``.

    Args:
        name: how ``--backbone`` and `attach` will call it.
        where: address of an object that answers `zinit.backbones.base.Backbone`; imported when first needed.

    Raises:
        ConfigError: if the name is taken or the address malformed.
    """
    from zinit.backbones import BACKBONES

    BACKBONES.register(name, where)


def register_task(name: str, where: str) -> None:
    """Adds a task: ``zinit.register_task("mine", "my_package.task:MyTask")``; see `register_backbone`."""
    from zinit.tasks import TASKS

    TASKS.register(name, where)


def register_method(name: str, where: str) -> None:
    """Adds a method: ``zinit.register_method("mine", "my_package.method:MyMethod")``; see `register_backbone`."""
    from zinit.methods import METHODS

    METHODS.register(name, where)
