"""What an attention module of transformers sees of its config, and where it finds its attention function.

A module looks its function up by ``config._attn_implementation``. A view of the config that names another function
leads it there. Some modules ask for that name besides (to build a mask of their own for "sdpa", say): they get the
host's answer, and their look-up is caught in their file instead.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from zinit.errors import BackboneError

NEXT_STEP = "Describe the model in a short file and register it: zinit.register_backbone('mine', 'my_package:MINE')."
REGISTRY = "ALL_ATTENTION_FUNCTIONS"  # what every file of transformers calls its registry of attention functions
NAME = "_attn_implementation"
Attention = Callable[..., tuple[Tensor, Tensor | None]]


class ConfigView:
    """A model's config as one attention module sees it: live, but leading the look-up to another function.

    A kind of view either names the function that is registered for it, or gives the host's answer (for modules of which
    `asks_for_implementation` is true).

    Args:
        host: the model's config.
        attention: class of the module.

    Raises:
        BackboneError: if the module does not use the attention interface.
    """

    zinit_function: ClassVar[Attention]
    zinit_name: ClassVar[str] = ""

    def __init__(self, host: Any, attention: type) -> None:
        self.zinit_host, self.zinit_attention = host, attention
        self._find_home()

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("__", "zinit_")):  # not there while being copied or unpickled
            raise AttributeError(name)
        return getattr(self.zinit_host, name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._find_home()  # in another process the function has to be registered again

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in ("zinit_host", "zinit_attention")}

    def _find_home(self) -> None:
        from transformers.modeling_utils import AttentionInterface

        self.zinit_eager, self.zinit_interface = attention_home(self.zinit_attention)
        if name := self.zinit_name:
            AttentionInterface.register(name, type(self).zinit_function)
        else:
            catch_lookup(self.zinit_attention)


class HostView:
    """An attention module as other attention functions must see it: with the model's own config."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self.module, self.config = module, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


# --- where a module finds its attention function ----------------------------------------------------------------------


def attention_home(attention: type) -> tuple[Attention, Any]:
    """The eager attention that a class of modules falls back on, and the registry of attention functions it looks in.

    Raises:
        BackboneError: if it does not use the attention interface.
    """
    home = _home_of(attention)
    if home is None:
        raise BackboneError(f"{attention.__name__} does not use transformers' attention interface. {NEXT_STEP}")
    file, eager = home
    registry = getattr(file, REGISTRY)
    return eager, registry.registry if isinstance(registry, Lookup) else registry


@functools.cache
def _home_of(attention: type) -> tuple[Any, Attention] | None:
    for cls in attention.__mro__:
        home = sys.modules[cls.__module__]
        for function in vars(cls).values():
            names = getattr(getattr(inspect.unwrap(function), "__code__", None), "co_names", ())
            eager = [name for name in names if name.endswith("eager_attention_forward") and hasattr(home, name)]
            if "get_interface" in names and eager and hasattr(home, REGISTRY):
                return home, getattr(home, eager[0])
    return None


class Lookup:
    """Stands for the registry in one file of transformers: modules whose config is a view of ours find its function.

    All other modules of that file find what they found before.

    Args:
        registry: the one it stands for.
    """

    def __init__(self, registry: Any) -> None:
        self.registry = registry

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "registry":
            raise AttributeError(name)
        return getattr(self.registry, name)

    def __getitem__(self, name: str) -> Any:
        return functools.partial(_dispatch, self.registry[name])

    def __contains__(self, name: object) -> bool:
        return name in self.registry

    def get_interface(self, name: Any, default: Attention) -> Attention:
        """What the registry has by that name, for all modules but ours."""
        return functools.partial(_dispatch, self.registry.get_interface(name, default))


def _dispatch(found: Attention, module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return getattr(type(module.config), "zinit_function", found)(module, *args, **kwargs)


def catch_lookup(attention: type) -> None:
    """Puts a `Lookup` in the file that a class of attention modules is looked up from, for good."""
    home = _home_of(attention)
    if home is not None and not isinstance(getattr(home[0], REGISTRY), Lookup):
        setattr(home[0], REGISTRY, Lookup(getattr(home[0], REGISTRY)))


# --- what else a module asks ------------------------------------------------------------------------------------------


@functools.cache
def asks_for_implementation(attention: type) -> bool:
    """Whether a class's code may ask for the implementation's name besides looking it up; yes where there is no source.

    It asks if it reads the name anywhere else, or hands its config on to somebody who may.
    """
    for cls in attention.__mro__:
        if cls.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
        except (OSError, TypeError, SyntaxError):
            return True
        if any(_asks(node, parents) for node, parents in _with_parents(tree)):
            return True
    return False


def _with_parents(node: ast.AST, parents: tuple[ast.AST, ...] = ()) -> Iterator[tuple[ast.AST, tuple[ast.AST, ...]]]:
    """Every node with those above it, nearest first; what runs only once, when the module is made, left out."""
    yield node, parents
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.FunctionDef) and child.name == "__init__"):
            yield from _with_parents(child, (node, *parents))


def _asks(node: ast.AST, parents: tuple[ast.AST, ...]) -> bool:
    if not (isinstance(node, ast.Attribute) and node.attr == "config" and isinstance(node.ctx, ast.Load)):
        return False
    user = parents[0]
    if isinstance(user, ast.Attribute):
        return user.attr == NAME and not _is_call(parents[1], "get_interface", user)
    if isinstance(user, ast.Call) and _is_call(user, "getattr", node):
        asked = user.args[1]
        return not isinstance(asked, ast.Constant) or asked.value == NAME
    return True


def _is_call(node: ast.AST, name: str, first: ast.AST) -> bool:
    """Whether it is a call by that name with that first argument."""
    if not isinstance(node, ast.Call) or not node.args or node.args[0] is not first:
        return False
    return (node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")) == name
