"""What a compiled model leaves its graph for. Importing it imports the compiler: only where a model is compiled."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zinit.adapter.calls import until_return
from zinit.adapter.state import AdapterState
from zinit.prefix import Context


@torch.compiler.disable(
    reason="zinit_context comes with the call, and a scope cannot be opened inside a graph: with fullgraph=True, write "
    "'with handle.context(context):' around the call of the compiled model instead"
)
def take_context(module: nn.Module, state: AdapterState, context: Tensor | Context) -> None:
    """Makes the context of a call a scope until the module returns; see `zinit.adapter.calls`."""
    until_return(module, state.with_context(context))
