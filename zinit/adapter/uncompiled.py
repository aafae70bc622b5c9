"""What a compiled model leaves its graph for. Importing this imports the compiler: only where a model is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(
    reason="zinit_context comes with the call, and a scope cannot be opened inside a graph: with fullgraph=True, write "
    "'with handle.context(context):' around the call of the compiled model instead"
)
def outside_graph(open_scope: Callable[..., None], *given: Any) -> None:
    """Calls what opens the scope of a call; see `zinit.adapter.calls`."""
    open_scope(*given)
