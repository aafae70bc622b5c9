"""timm's Vision Transformers, EVA, BEiT, Swin and others that attend as they do.

Projections may be fused or separate; q/k norms, rotations, biases of relative position and windows are kept. timm has
no attention interface, but its attention modules pass everything that matters through named submodules: the query
leaves ``q_norm`` (an identity where there is no norm), the heads' output enters ``norm`` (or ``proj``). Hooks on those
two take the host's own query and add the gated prefix: no forward is copied and nothing is renamed. Modules without a
``q_norm`` show their query to ``qkv`` (Swin) or to nobody (BEiT reads the weights of its ``qkv``); only then is it
projected a second time. Before a model is accepted, each of its modules is run on random vectors: what it gives to
``norm`` must be the plain softmax attention of its projections and biases, or the model is refused.
"""

from __future__ import annotations

import functools
import inspect
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zinit.backbones.base import AttentionSite, PrefixSlot, random_like, shares_softmax, with_real_weights
from zinit.compat import has_window_bias, window_bias
from zinit.errors import BackboneError, ConfigError
from zinit.prefix import concat_prefix

KNOWN = {"x", "rope", "attn_mask", "is_causal", "mask", "shared_rel_pos_bias", "shared_rel_pos"}
NEXT_STEP = "Describe the model in a short file and register it: zinit.register_backbone('mine', 'my_package:MINE')."


@dataclass
class Forward:
    """One forward pass of one attention module, as far as it has come."""

    host: Any
    given: dict[str, Any]
    query: Tensor | None = None


_THREAD = threading.local()  # one model may be called by several threads: what its hooks pass on is each thread's own


def _forward_here() -> Forward | None:
    return getattr(_THREAD, "forward", None)


class Seam:
    """The hooks on one attention module. They find the prefixes in the module that is called: copies have their own.

    Args:
        host: the attention module.
        heard: only listen, and put each (query, heads' output) in this list.
    """

    def __init__(self, host: nn.Module, heard: list[tuple[Tensor, Tensor]] | None = None) -> None:
        self.heard = heard
        self.order = list(inspect.signature(type(host).forward).parameters)[1:]
        exit = getattr(host, "norm", None) or host.proj
        self.handles = [
            host.register_forward_pre_hook(self.begin, with_kwargs=True),
            exit.register_forward_pre_hook(self.add),  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        ]
        if hasattr(host, "q_norm"):
            self.handles.append(host.q_norm.register_forward_hook(self.catch))  # pyright: ignore
        elif getattr(host, "qkv", None) is not None:
            self.handles.append(host.qkv.register_forward_hook(self.catch_fused))  # pyright: ignore

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self.handles:
            handle.remove()

    def begin(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keeps the module's arguments."""
        _THREAD.forward = Forward(host, dict(zip(self.order, args, strict=False)) | kwargs)

    def catch(self, norm: nn.Module, args: tuple[Any, ...], query: Tensor) -> None:
        """Keeps the query."""
        forward = _forward_here()
        if forward is not None:
            forward.query = query

    def catch_fused(self, projection: nn.Module, args: tuple[Any, ...], projected: Tensor) -> None:
        """Keeps the query that a fused projection of the words gives; prompts pass it too, outside of a forward."""
        forward = _forward_here()
        if forward is not None:
            forward.query = in_heads(forward.host, projected.chunk(3, dim=-1)[0])

    def add(self, exit: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Adds the prefix to what the heads give: (B, T, H * D) in ``args``."""
        forward = _forward_here()
        _THREAD.forward = None
        if forward is None:
            return None
        if self.heard is not None:
            self.heard.append((final_query(forward), args[0]))
            return None
        host, slot = forward.host, forward.host.zinit
        prefix = slot.prefix()
        if prefix is None:
            return None
        if "mask" in self.order and slot.per_sample:
            raise ConfigError(
                f"{type(host).__name__} attends within windows and does not know which sample one is of: it takes "
                f"neither a route nor a context. Activate one adapter for the whole batch."
            )
        query = final_query(forward)
        prompts = slot.keys_values(host, prefix, query.dtype)
        if not shares_softmax(prefix):
            return (args[0] + heads_side_by_side(prefix(query, *prompts, host.scale)).view_as(args[0]), *args[1:])
        slot.check_rows(prefix, query.shape[0])
        dropout = host.attn_drop.p if host.training else 0.0
        if not prefix.config.gating:
            shared = attend_again(forward, query, prompts, dropout)
            return (heads_side_by_side(shared).view_as(args[0]), *args[1:])
        # as with a softmax of its own, what is added has no dropout: gates would open to average two draws
        own = attend_again(forward, query) if dropout else in_heads(host, args[0])
        addition = prefix.toward(query, own, attend_again(forward, query, prompts))
        return (args[0] + heads_side_by_side(addition).view_as(args[0]), *args[1:])


def final_query(forward: Forward) -> Tensor:
    """(B, H, T, D): the query that meets the keys, rotated where the host rotates."""
    host, given = forward.host, forward.given
    query = project_query(host, given["x"]) if forward.query is None else forward.query
    return rotate(host, query, given.get("rope"))


def attend_again(
    forward: Forward, query: Tensor, prompts: tuple[Tensor, Tensor] | None = None, dropout: float = 0.0
) -> Tensor:
    """The heads' output for the words, or for prompts and words in one softmax: (B, H, T, D)."""
    host, given = forward.host, forward.given
    key, value = project_kv(host, given["x"])
    key = rotate(host, key, given.get("rope"))
    causal = given.get("is_causal", False)
    mask = None if causal else added_to_scores(host, given)
    if prompts is not None:
        key, value, mask = concat_prefix(query, key, value, mask, causal, prompts)
    shared_by = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared_by, dim=1), value.repeat_interleave(shared_by, dim=1)
    causal = causal and prompts is None  # with prompts it has a mask by now
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout_p=dropout, is_causal=causal, scale=host.scale
    )


def heads_side_by_side(x: Tensor) -> Tensor:
    """(B, H, T, D) to (B, T, H * D)."""
    return x.transpose(1, 2).flatten(2)


def rotate(host: nn.Module, x: Tensor, rope: Tensor | None) -> Tensor:
    """Rotates (B, H, T, D) as the host does: all tokens but the class and register tokens."""
    if rope is None:
        return x
    from timm.layers import apply_rot_embed_cat

    first: int = host.num_prefix_tokens  # pyright: ignore[reportAssignmentType]
    half = {"half": True} if getattr(host, "rotate_half", False) else {}
    turned = apply_rot_embed_cat(x[:, :, first:], rope, **half)
    return torch.cat([x[:, :, :first], turned], dim=2).type_as(x)


def project_kv(host: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(K, C) or (B, K, C) through the host's key and value projections, biases and key norm included; not rotated."""
    tokens = tokens if tokens.dim() == 3 else tokens[None]
    if getattr(host, "qkv", None) is not None:
        projected = host.qkv(tokens)
        if getattr(host, "q_bias", None) is not None:  # EVA keeps the bias apart from the projection
            projected = projected + torch.cat([host.q_bias, host.k_bias, host.v_bias]).to(projected.dtype)
        _, key, value = projected.chunk(3, dim=-1)
    else:
        key, value = host.k_proj(tokens), host.v_proj(tokens)
    key, value = (x.unflatten(-1, (-1, width_of_head(host))).transpose(1, 2) for x in (key, value))
    return (host.k_norm(key) if hasattr(host, "k_norm") else key), value


def project_query(host: Any, tokens: Tensor) -> Tensor:
    """(B, T, C) to the queries (B, H, T, D) of a host that shows them to none of its layers."""
    if getattr(host, "qkv", None) is None:
        return in_heads(host, host.q_proj(tokens))
    return in_heads(host, F.linear(tokens, host.qkv.weight[: host.num_heads * width_of_head(host)], host.q_bias))


def reads_weights(host: Any) -> bool:
    """Whether a module multiplies by the weights of its ``qkv`` without calling it, as timm's BEiT and EVA-02 do."""
    return getattr(host, "q_bias", None) is not None and not getattr(host, "qkv_bias_separate", True)


def in_heads(host: Any, x: Tensor) -> Tensor:
    """(B, T, H * D) to (B, H, T, D)."""
    return x.flatten(1, -2).unflatten(-1, (-1, width_of_head(host))).transpose(1, 2)


def width_of_head(host: Any) -> int:
    """D, which some of timm's modules do not note down."""
    return getattr(host, "head_dim", None) or host.qkv.out_features // (3 * host.num_heads)


def added_to_scores(host: Any, given: dict[str, Any]) -> Tensor | None:
    """The mask or biases on a host's scores, (1 or B, 1 or H, T, T); None if there are none.

    Biases of relative position are a module's own or its model's shared ones; Swin's mask is (windows, T, T), for
    windows that lie one after the other in the batch.
    """
    terms: list[Tensor | None] = [given.get(name) for name in ("attn_mask", "shared_rel_pos_bias", "shared_rel_pos")]
    if getattr(host, "rel_pos", None) is not None:
        terms.append(host.rel_pos.get_bias())
    if getattr(host, "relative_position_bias_table", None) is not None:
        terms.append(window_bias(host))
    if (mask := given.get("mask")) is not None:
        terms.append(mask.repeat(given["x"].shape[0] // len(mask), 1, 1)[:, None])
    there = [term for term in terms if term is not None]
    return functools.reduce(torch.add, there) if there else None


class TimmBackbone:
    """timm models whose attention is plain, by a numerical check of each module."""

    name, default_task, demo_model = "vit", "vtab", "zinit.demo:vit_path"

    def matches(self, model: nn.Module) -> bool:
        """Whether it is a timm model, or a part of one that attends."""
        if not any(cls.__module__.startswith("timm.") for cls in type(model).__mro__):
            return False
        return hasattr(model, "pretrained_cfg") or any(is_attention(module) for module in model.modules())

    def sites(self, model: nn.Module) -> list[AttentionSite]:
        """The attention modules, lowest layer first.

        Raises:
            BackboneError: if there are none, or one of them attends in another way; the message says which and why.
        """
        found: list[AttentionSite] = []
        for name, module in model.named_modules():
            if "zinit" in name.split(".") or not is_attention(module):
                continue
            if reason := why_unsupported(module):
                raise BackboneError(f"{name} ({type(module).__name__}) cannot take a prefix: {reason}. {NEXT_STEP}")
            found.append(site_of(name, module))
        if not found:
            raise BackboneError(
                f"{type(model).__name__} has no attention of a Vision Transformer's kind (qkv or q_proj, k_proj, "
                f"v_proj; num_heads; proj). {NEXT_STEP}"
            )
        return found

    def install(self, model: nn.Module, site: AttentionSite, slot: PrefixSlot) -> None:
        """Adds the child ``zinit`` and the hooks."""
        site.module.add_module("zinit", slot)
        vars(slot)["seam"] = Seam(site.module)

    def uninstall(self, model: nn.Module, site: AttentionSite) -> None:
        """Takes the hooks and the child away again."""
        seam: Seam = site.module.zinit.seam  # pyright: ignore
        seam.remove()
        del site.module.zinit


VIT = TimmBackbone()


def is_attention(module: nn.Module) -> bool:
    """Whether a module looks like a self-attention at all."""
    fused, separate = getattr(module, "qkv", None), getattr(module, "k_proj", None)
    return (fused is not None or separate is not None) and hasattr(module, "num_heads") and hasattr(module, "proj")


def site_of(name: str, module: Any) -> AttentionSite:
    """The facts about an attention module that `why_unsupported` has nothing against."""
    fused = getattr(module, "qkv", None)
    keys = fused.out_features // 3 if fused is not None else module.k_proj.out_features
    return AttentionSite(
        name=name,
        module=module,
        width=(fused if fused is not None else module.k_proj).in_features,
        num_heads=module.num_heads,
        num_kv_heads=keys // width_of_head(module),
        head_dim=width_of_head(module),
        project_kv=project_kv,
        query_value=None if reads_weights(module) else ("q_proj", "v_proj") if fused is None else ("qkv",),
    )


@torch.no_grad()
def why_unsupported(module: Any) -> str:
    """Why an attention module cannot take a prefix; empty if it can."""
    if has_foreign_bias(module):
        return "it adds relative position biases, which zinit does not reproduce"
    if hasattr(module, "lambda_init"):
        return "it attends by the difference of two softmaxes, which zinit does not reproduce"
    if getattr(module, "gate", None) is not None:
        return "it gates its attention's output (timm's `gated`), which zinit does not reproduce"
    if not hasattr(module, "scale"):
        return "it has no scale, unlike timm's own Attention"
    projections = [getattr(module, part, None) for part in ("qkv", "k_proj", "v_proj")]
    if not all(hasattr(projection, "in_features") for projection in projections if projection is not None):
        return "its projections are not linear layers"
    parameters = inspect.signature(type(module).forward).parameters
    others = list(parameters.keys() - KNOWN - {"self"})
    if others:
        return f"its forward takes {', '.join(sorted(others))}, which zinit does not reproduce"
    host: Any = with_real_weights(module)
    site = site_of("", host)
    if site.num_heads * site.head_dim != getattr(host.proj, "in_features", None):
        return f"its {site.num_heads} heads of width {site.head_dim} are not what its proj takes"
    weight = next(host.parameters())
    training = {part: part.training for part in host.modules()}
    host.eval()  # no dropout
    try:
        with torch.autocast(weight.device.type, enabled=False):
            biases, first = added_to_scores(host, {}), getattr(host, "num_prefix_tokens", 0)
            tokens = first + 5 if biases is None else biases.shape[-1]
            states = random_like(weight, 2, tokens, site.width)
            others = {
                "rope": random_like(weight, tokens - first, 2 * site.head_dim),
                "mask": random_like(weight, 2, tokens, tokens),
                "shared_rel_pos_bias": random_like(weight, 1, site.num_heads, tokens, tokens),
            }
            if getattr(host, "rel_pos", None) is None:  # one or the other, for timm
                others["shared_rel_pos"] = others["shared_rel_pos_bias"]
            for given in ({}, *({name: others[name]} for name in sorted(others.keys() & parameters.keys()))):
                if reason := difference(host, site, states, given):
                    return reason
    except Exception as error:  # whatever a model raises that cannot be called on tokens alone
        return f"its forward does not run on plain tokens ({type(error).__name__}: {str(error)[:100]})"
    finally:
        for part, mode in training.items():
            part.training = mode
    return ""


def has_foreign_bias(module: Any) -> bool:
    """Whether a module has biases of relative position that `added_to_scores` does not know."""
    position, table = getattr(module, "rel_pos", None), getattr(module, "relative_position_bias_table", None)
    return (
        any(getattr(module, part, None) is not None for part in ("attention_biases", "cpb_mlp"))
        or (position is not None and not hasattr(position, "get_bias"))
        or (table is not None and not has_window_bias(module))
    )


def difference(host: Any, site: AttentionSite, states: Tensor, given: dict[str, Tensor]) -> str:
    """How the module's attention of (1, T, C) differs from that of its projections; empty if it does not."""
    heard: list[tuple[Tensor, Tensor]] = []
    seam = Seam(host, heard)
    try:
        host(states, **given)
    finally:
        seam.remove()
    query, out = heard[0] if heard else (None, None)
    if query is None or out is None or query.shape[1:] != (site.num_heads, states.shape[1], site.head_dim):
        return "its query does not leave q_norm as (batch, heads, tokens, width of a head)"
    key, value = project_kv(host, states)
    key = rotate(host, key, given.get("rope"))
    shared_by = site.num_heads // site.num_kv_heads
    key, value = key.float().repeat_interleave(shared_by, dim=1), value.float().repeat_interleave(shared_by, dim=1)
    mask = added_to_scores(host, {"x": states, **given})
    mask = None if mask is None else mask.float()
    plain = heads_side_by_side(F.scaled_dot_product_attention(query.float(), key, value, mask, scale=host.scale))
    slack = 1e-4 if states.dtype == torch.float32 else 3e-2
    if plain.shape != out.shape or not (plain - out.float()).abs().max() <= slack * plain.abs().max():
        return (
            "its heads' output is not the plain softmax(q k) v of its projections (a scale or bias of its own, "
            "a difference of two softmaxes, or the like)"
        )
    return ""
