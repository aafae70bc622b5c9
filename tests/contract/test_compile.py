"""What every backbone promises under `torch.compile`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zinit
from tests.contract.cases import Case
from tests.contract.checks import OPEN, gradients, loss_of, run, set_implementation, shortened


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_compiles_without_a_graph_break(leader: Case, implementation: str) -> None:
    if leader.implementations and implementation not in leader.implementations:
        pytest.skip(f"no {implementation}")
    torch.compiler.reset()
    model = shortened(leader.build()).train()
    set_implementation(model, implementation if leader.implementations else None)
    handle = zinit.attach(model, OPEN, seed=0)
    loss_of(leader, model).backward()
    eager = gradients(handle)
    model.zero_grad()
    backend = "aot_eager" if implementation == "sdpa" else "eager"  # once through autograd's graph is enough
    compiled: Any = torch.compile(model, fullgraph=True, backend=backend)
    loss_of(leader, compiled).backward()
    for name, grad in gradients(handle).items():
        torch.testing.assert_close(grad, eager[name], atol=1e-6, rtol=1e-5)
    torch.compiler.reset()


def test_a_compiled_model_notices_what_happens_to_the_adapter(leader: Case) -> None:
    """Attached after compiling, disabled, and detached: the graph is remade, never stale."""
    torch.compiler.reset()
    model = shortened(leader.build())
    compiled: Any = torch.compile(model, backend="eager")
    frozen = run(leader, compiled)
    handle = zinit.attach(compiled, OPEN)
    assert zinit.get_handle(compiled) is handle
    changed = run(leader, compiled)
    torch.testing.assert_close(changed, run(leader, model), atol=1e-5, rtol=1e-5)
    assert (changed - frozen).abs().max() > 1e-2
    with handle.disabled():
        torch.testing.assert_close(run(leader, compiled), frozen, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(run(leader, compiled), changed, atol=1e-5, rtol=1e-5)
    handle.detach()
    torch.testing.assert_close(run(leader, compiled), frozen, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()
