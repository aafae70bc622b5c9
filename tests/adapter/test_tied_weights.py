"""What a model ties and resizes stays apart from what an adapter has put below its modules."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from torch import nn

import zinit
from tests.contract.cases import causal_lm, randomized
from tests.contract.checks import assert_same, snapshot

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 61}
KINDS = ["hybrid", "mamba", "hybrid", "hybrid"]
MAMBA: dict[str, dict[str, Any]] = {
    "Zamba": {"mamba_dt_rank": 4, "n_mamba_heads": 2, "mamba_d_state": 8, "num_key_value_heads": 4},
    "Zamba2": {"num_mem_blocks": 1, "mamba_headdim": 16, "mamba_ngroups": 1, "mamba_d_state": 8},
}


def zamba(kind: str) -> Any:
    """One attention's weights serve three layers: named by a pattern that everything below them matches."""
    config = getattr(transformers, f"{kind}Config")(
        **SHAPE | MAMBA[kind], layers_block_type=KINDS, use_mamba_kernels=False, pad_token_id=0, eos_token_id=None
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomized(model).tie_weights()  # pyright: ignore
    return model


def prompts(handle: zinit.Handle) -> list[nn.Parameter]:
    return [prefix.get_parameter("prompt.weight") for prefix in handle.prefixes.values()]


@pytest.mark.parametrize("kind", MAMBA)
@pytest.mark.parametrize("layers", [None, 2])
def test_prefixes_are_not_tied_with_the_modules_above_them(kind: str, layers: int | None) -> None:
    model = zamba(kind)
    before = snapshot(model)
    shared = [module.k_proj.weight for module in model.modules() if hasattr(module, "k_proj")]
    handle = zinit.attach(model, zinit.PrefixConfig(length=3, layers=layers), seed=0)
    own = prompts(handle)
    assert len({id(prompt) for prompt in own}) == len(handle.prefixes) == (layers or 3)
    model.tie_weights()
    assert [id(prompt) for prompt in prompts(handle)] == [id(prompt) for prompt in own]
    assert len({id(weight) for weight in shared}) == 1, "the host's own are still tied"
    handle.detach()
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("kind", MAMBA)
def test_resizing_ties_nothing_of_the_adapter(kind: str) -> None:
    model = zamba(kind)
    handle = zinit.attach(model, zinit.PrefixConfig(length=3), seed=0)
    own = prompts(handle)
    model.resize_token_embeddings(70)
    assert [id(prompt) for prompt in prompts(handle)] == [id(prompt) for prompt in own]


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_resized_meanwhile_trains_again_after_detach(tied: bool) -> None:
    model: Any = causal_lm("Llama", tie_word_embeddings=tied)
    kept = model.model.layers[0].mlp.up_proj.weight
    kept.requires_grad_(False)
    handle = zinit.attach(model, zinit.PrefixConfig(length=3))
    model.resize_token_embeddings(70)
    assert not model.lm_head.weight.requires_grad
    handle.detach()
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        "model.layers.0.mlp.up_proj.weight"
    }
