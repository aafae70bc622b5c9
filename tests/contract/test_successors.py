"""What came after (arXiv 2502.03029): gates by query and prompts that networks make, on every backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zinit
from tests.contract.cases import Case, causal_lm, text_batch
from tests.contract.checks import run
from tests.contract.test_oracle import open_up
from zinit.adapter.sources import DeepShare
from zinit.errors import ConfigError
from zinit.interop.convert import convert

BY_QUERY = zinit.PrefixConfig(length=3, layers=2, gate="query")


def assert_near(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """By the size of the largest number."""
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def one_tower(case: Case, config: zinit.PrefixConfig) -> zinit.PrefixConfig:
    """The settings, for the first tower where there are several: layers that share must be of one width."""
    towers = sorted({site.tower for site in zinit.attach(case.build(), config).sites})
    return zinit.PrefixConfig(**{**vars(config), "towers": (towers[0],)})


def test_gates_by_query_on_every_backbone(case: Case, tmp_path: Path) -> None:
    """Closed they change no bit and only they learn; open they change the output, and come back from a folder."""
    model = case.build()
    base = run(case, model)
    handle = zinit.attach(model, BY_QUERY, seed=0)
    assert all(gates.isnan().all() for gates in handle.gates().values())
    assert torch.equal(run(case, model), base)
    assert all(not gates.any() for gates in handle.gates().values())  # 0, not NaN: there was a forward pass
    case.output(model, case.batch("left")).sum().backward()
    for name, parameter in handle.named_parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.any()) == name.endswith("gate"), name
    open_up(handle)
    opened = run(case, model)
    assert (opened - base).abs().max() > 1e-3
    assert all((gates > 0).all() and (gates < 1).all() for gates in handle.gates().values())
    handle.save(tmp_path)
    assert torch.equal(run(case, zinit.load(case.build(), tmp_path).model), opened)


@pytest.mark.parametrize("kind", ["hyper", "deepshare"])
def test_networks_of_prompts_are_saved_as_the_tables_that_they_make(kind: Any, leader: Case, tmp_path: Path) -> None:
    model = leader.build()
    config = one_tower(leader, zinit.PrefixConfig(length=3, layers=2, prompts=kind, gate_init=0.9))
    handle = zinit.attach(model, config, seed=0)
    with torch.no_grad():
        handle.shared[kind].out.weight.mul_(1e5 if kind == "hyper" else 1)  # pyright: ignore
    handle.save(tmp_path / "network")
    handle.save(tmp_path / "tables", tables=True)
    expected = run(leader, model)
    plain = zinit.load(leader.build(), tmp_path / "tables")
    assert plain.config == zinit.PrefixConfig(**{**vars(config), "prompts": "table"})
    assert not plain.shared
    assert_near(run(leader, plain.model), expected, 1e-6)
    assert torch.equal(run(leader, zinit.load(leader.build(), tmp_path / "network").model), expected)


def test_a_network_is_written_as_a_table_in_the_projects_format(tmp_path: Path) -> None:
    model = causal_lm("Llama", num_key_value_heads=4)
    handle = zinit.attach(model, zinit.PrefixConfig(length=3, layers=2, prompts="deepshare", gate_init=0.5), seed=0)
    expected = model(**text_batch("left")).logits
    handle.export(tmp_path / "v1.pth", format="official-v1")
    again = causal_lm("Llama", num_key_value_heads=4)
    zinit.import_adapter(again, tmp_path / "v1.pth", length=3)
    assert_near(again(**text_batch("left")).logits, expected, 1e-6)
    handle.save(tmp_path / "network")
    made = {"source_format": "zinit", "target_format": "zinit", "model": causal_lm("Llama", num_key_value_heads=4)}
    convert(tmp_path / "network", tmp_path / "tables", **made, tables=True)  # pyright: ignore
    assert not zinit.load(causal_lm("Llama", num_key_value_heads=4), tmp_path / "tables").shared
    with pytest.raises(ConfigError, match=r"has no option 'table'\. Did you mean 'tables'"):
        convert(tmp_path / "network", tmp_path / "more", **made, table=True)  # pyright: ignore


def test_gates_by_query_are_written_in_no_other_format(tmp_path: Path) -> None:
    handle = zinit.attach(causal_lm("Llama", num_key_value_heads=4), BY_QUERY)
    for format in ("official-v1", "peft"):
        with pytest.raises(zinit.CheckpointError, match="its gates depend on the query"):
            handle.export(tmp_path / "out", format=format)


def test_deepshare_is_its_equations() -> None:
    network = DeepShare(layers=3, length=2, width=5, hidden=4, embedding=6, generator=torch.Generator().manual_seed(0))
    own = {name: parameter.detach().double() for name, parameter in network.named_parameters()}
    for layer in range(3):
        for k in range(2):
            hidden = (own["hidden.weight"] @ own["embedding"][layer, k] + own["hidden.bias"]).clamp_min(0)
            expected = own["out.weight"] @ hidden + own["out.bias"]
            torch.testing.assert_close(network(layer)[k].double(), expected, rtol=1e-6, atol=1e-6)
    # 32 layers of 10 prompts: 320 x 256 + 256 x 64 + 64 + 64 x 4096 + 4096
    whole = DeepShare(layers=32, length=10, width=4096)
    assert sum(parameter.numel() for parameter in whole.parameters()) == 364_608
    assert 0.05 < whole(3).std().item() < 0.5


def test_a_route_with_gates_by_query(leader: Case) -> None:
    """Each row as alone: by query, by query with one gate for a layer, by head, and none."""
    model = leader.build()
    configs = {
        "query": BY_QUERY,
        "layer": zinit.PrefixConfig(length=2, layers=1, gate="query", gate_per="layer"),
        "head": zinit.PrefixConfig(length=3, layers=2, gate_init=0.7),
    }
    handles = {name: zinit.attach(model, config, name=name, seed=1) for name, config in configs.items()}
    for handle in handles.values():
        open_up(handle)
    for routed in (["query", "layer", "head"], ["head", None, "query"]):
        rows: list[Tensor] = []
        for row, name in enumerate(routed):
            if name is None:
                with handles["head"].disabled():
                    rows.append(run(leader, model)[row])
            else:
                handles[name].activate()
                rows.append(run(leader, model)[row])
        with torch.no_grad(), handles["query"].route(routed):
            assert_near(run(leader, model), torch.stack(rows), 1e-6)
