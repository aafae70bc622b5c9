"""The seam into transformers.

Every attention module there looks its implementation up by ``self.config._attn_implementation`` and hands it the final
query (rotated where the model rotates); what comes back is projected by the module itself. So one registered attention
function serves every family: it calls the implementation the model would have used and adds the gated prefix.

To route a module through that function, its ``config`` attribute is replaced by a view of the same config that differs
in this one name (see `zinit.backbones._view`). The model's own config stays as it is: masks are still made for the
host's implementation, ``set_attn_implementation`` keeps working after attaching, nothing is written into
``config.json``, and modules without a prefix are not touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from zinit.backbones._rows import rows_of
from zinit.backbones._view import NEXT_STEP, ConfigView, HostView, asks_for_implementation
from zinit.backbones.base import AttentionSite, PrefixSlot, SharingPrefix, shares_softmax
from zinit.compat import attention_implementation, guard_tied_weights, unguard_tied_weights
from zinit.errors import BackboneError
from zinit.prefix import concat_prefix

IMPLEMENTATION = "zinit"
PLAIN = ("sdpa", "eager", "flex_attention")  # ask nothing of the module's config

Attended = tuple[Tensor, Tensor | None]
"""(B, T, H, D), and attention weights where the host gives them."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> Attended:
    """The registered attention function: the host's own result plus the gated prefix.

    Args:
        module: the host attention module.
        query: (B, H, T, D), final.
        key: (B, G, S, D), cache included.
        value: (B, G, S, D).
        attention_mask: in whatever form the host's implementation takes.
        kwargs: the host's; ``zinit_context`` (B, 1 or K, C), a per-sample addition to the prompts, is ours.

    Returns:
        (B, T, H, D) and whatever attention weights the host's implementation returns (words only).
    """
    config: ConfigView = module.config  # pyright: ignore[reportAssignmentType]
    name = attention_implementation(config.zinit_host) or "eager"
    attention = config.zinit_interface.get_interface(name, config.zinit_eager)
    host = module if name in PLAIN else HostView(module, config.zinit_host)
    context = kwargs.pop("zinit_context", None)
    slot: PrefixSlot = module.zinit  # pyright: ignore[reportAssignmentType]
    found = slot.prefix_and_kv(module, query.dtype, context)
    if found is None:
        return attention(host, query, key, value, attention_mask, **kwargs)

    prefix, prompt_key, prompt_value = found
    if shares_softmax(prefix):
        slot.check_rows(prefix, query.shape[0])
        if name not in ("sdpa", "eager"):
            raise BackboneError(
                f"prefix tuning (separate_softmax=False) needs the attention implementation 'sdpa' or 'eager', "
                f"not {name!r}. Call model.set_attn_implementation('sdpa')."
            )
        words = key, value, attention_mask, kwargs
        both = with_prompts(module, query, *words, (prompt_key, prompt_value), fused=name == "sdpa")
        return attend_jointly(prefix, query, partial(attention, host, query), words, both)

    out, weights = attention(host, query, key, value, attention_mask, **kwargs)
    scale = kwargs.get("scaling")
    addition = prefix(query, prompt_key, prompt_value, query.shape[-1] ** -0.5 if scale is None else scale)
    return out + addition.transpose(1, 2), weights


Given = tuple[Tensor, Tensor, Any, dict[str, Any]]
"""What a host's attention function is given besides the query: keys, values, mask, and what has a name."""


def with_prompts(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    given: dict[str, Any],
    prompts: tuple[Tensor, Tensor],
    *,
    fused: bool,
) -> Given:
    """Prompts in front of the words, in everything that has a number for each of them."""
    causal = given.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    key, value, mask = concat_prefix(query, key, value, mask, causal and fused, prompts)
    given = given | without_position(given, prompts[0].shape[2], key.shape[2])
    # without a mask every query sees every key: the causal case has one by now
    return key, value, mask, given | ({"is_causal": False} if mask is None else {})


def attend_jointly(
    prefix: SharingPrefix, query: Tensor, attends: Callable[..., Attended], words: Given, both: Given
) -> Attended:
    """Plain prefix tuning, or what the gate makes of it; see `zinit.prefix.ZeroGatedPrefix.toward`.

    As with a softmax of its own, what is added has no dropout: gates would open to average the noise of two draws.
    """
    *tensors, given = words
    if not prefix.config.gating:
        *tensors, given = both
        return attends(*tensors, **given)
    out, weights = attends(*tensors, **given)
    quiet = {"dropout": 0.0} if given.get("dropout") else {}
    own = attends(*tensors, **given | quiet)[0] if quiet else out
    *tensors, given = both
    shared = attends(*tensors, **given | quiet)[0]
    return out + prefix.toward(query, own.transpose(1, 2), shared.transpose(1, 2)).transpose(1, 2), weights


def without_position(given: dict[str, Any], prompts: int, keys: int) -> dict[str, Tensor]:
    """Biases of position (T5's kind) for prompts and words: prompts take no position, so theirs are zero.

    Args:
        given: what the host hands to its attention function besides.
        prompts: K.
        keys: K + S.

    Raises:
        BackboneError: if something else there has a number for every word.
    """
    changed: dict[str, Tensor] = {}
    for name, value in given.items():
        if not isinstance(value, Tensor) or value.dim() < 3 or value.shape[-1] != keys - prompts:
            continue
        if name != "position_bias":
            raise BackboneError(
                f"prefix tuning (separate_softmax=False) cannot follow {name}, which the model hands to its "
                f"attention function for every word. Leave separate_softmax at True."
            )
        changed[name] = F.pad(value, (prompts, 0))
    return changed


class NamedView(ConfigView):
    """Names `attend`."""

    _attn_implementation = zinit_name = IMPLEMENTATION
    zinit_function = attend


class AnsweringView(ConfigView):
    """Gives the host's answer; the module's look-up is caught in its file."""

    zinit_function = attend

    @property
    def _attn_implementation(self) -> str | None:
        return attention_implementation(self.zinit_host)


class InterfaceSeam:
    """How a prefix gets into an attention module that looks its implementation up by its config."""

    def install(self, model: nn.Module, site: AttentionSite, slot: PrefixSlot) -> None:
        """Adds the child ``zinit`` and routes the module through `attend`."""
        host: Any = site.module
        kind = AnsweringView if asks_for_implementation(type(host)) else NamedView
        view = kind(host.config, type(host))
        host.add_module("zinit", slot)
        host.config = view
        guard_tied_weights(model, "zinit")

    def uninstall(self, model: nn.Module, site: AttentionSite) -> None:
        """Takes the child and the view away again."""
        host: Any = site.module
        del host.zinit
        host.config = host.config.zinit_host
        if not any(isinstance(module, PrefixSlot) for module in model.modules()):
            unguard_tied_weights(model)


@dataclass(frozen=True, kw_only=True)
class TransformersBackbone(InterfaceSeam):
    """A transformers family whose attention has separate key and value projections.

    Args:
        name: the registry's name.
        default_task: what `zinit train` does with it unless told otherwise.
        demo_model: address of a function that says where the embedded model lies; empty if there is none.
        model_types: ``config.model_type`` of the models it knows.
        attention: how the attention modules' paths end, in whole parts ("attention.self").
        head_dim: attribute name of the width of a head.
        query: attribute names of the projections, linear modules.
        key: see ``query``.
        value: see ``query``.
    """

    name: str
    default_task: str
    demo_model: str = ""
    model_types: tuple[str, ...]
    attention: str = "self_attn"
    head_dim: str = "head_dim"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"

    def matches(self, model: nn.Module) -> bool:
        """Whether the config of a model, or of a part of one that attends, names one of the family's types."""
        if getattr(getattr(model, "config", None), "model_type", None) not in self.model_types:
            return False
        return any(self._is_attention(name) for name, _ in model.named_modules())

    def sites(self, model: nn.Module) -> list[AttentionSite]:
        """The attention modules, lowest layer first.

        Raises:
            BackboneError: if the model has none, or one of them lacks what the family has.
        """
        modules = [(name, module) for name, module in model.named_modules() if self._is_attention(name)]
        found = [self._site(model, name, module) for name, module in modules]
        if not found:
            raise BackboneError(
                f"{type(model).__name__} has no module named {self.attention!r} to attach a prefix to. {NEXT_STEP}"
            )
        return found

    def _is_attention(self, name: str) -> bool:
        return f".{name}".endswith(f".{self.attention}") and "zinit" not in name.split(".")

    def _site(self, model: nn.Module, name: str, module: nn.Module) -> AttentionSite:
        for part in (self.query, self.key, self.value):
            if not hasattr(getattr(module, part, None), "out_features"):
                raise BackboneError(f"{name} ({type(module).__name__}) has no linear projection {part!r}. {NEXT_STEP}")
        if not hasattr(module, self.head_dim) or not hasattr(module, "config"):
            raise BackboneError(
                f"{name} ({type(module).__name__}) does not say its {self.head_dim} or its config. {NEXT_STEP}"
            )
        query, key = getattr(module, self.query), getattr(module, self.key)
        head_dim = int(getattr(module, self.head_dim))
        return AttentionSite(
            name=name,
            module=module,
            width=key.in_features,
            num_heads=query.out_features // head_dim,
            num_kv_heads=key.out_features // head_dim,
            head_dim=head_dim,
            project_kv=self.project_kv,
            project_query=self.project_query,
            query_value=(self.query, self.value),
            rows=rows_of(model, name, module),
        )

    def project_kv(self, host: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(K, C) or (B, K, C) through the host's frozen projections, their biases included; no norm, no rotation."""
        tokens = tokens if tokens.dim() == 3 else tokens[None]
        return self._heads(host, self.key, tokens), self._heads(host, self.value, tokens)

    def project_query(self, host: nn.Module, tokens: Tensor) -> Tensor:
        """(K, C) through the host's frozen query projection to (1, H, K, D); no norm, no rotation."""
        return self._heads(host, self.query, tokens[None])

    def _heads(self, host: nn.Module, projection: str, tokens: Tensor) -> Tensor:
        return getattr(host, projection)(tokens).unflatten(-1, (-1, getattr(host, self.head_dim))).transpose(1, 2)
