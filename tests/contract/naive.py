"""The oracle: a whole LLaMA forward pass with zero-init attention, written out from the papers in plain torch.

Nothing here comes from zinit or transformers. It loops over samples, heads and queries, computes every softmax by hand
and runs in float64, so that it can be checked by reading. The model's weights come in as a plain dictionary.

    o_h  =  softmax(q_h k^T / sqrt(D) + causal and padding mask) v  +  act(g_h) softmax(q_h P_k^T / sqrt(D)) P_v
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class NaiveModel:
    """The shape of a LLaMA-like model (C width, H heads, G key/value heads, D head width)."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    sliding_window: int | None = None


@dataclass(frozen=True, kw_only=True)
class NaivePrefix:
    """How the prefix works. Its tensors are named ``model.layers.I.self_attn.prompt.weight`` and so on."""

    squash: str = "tanh"
    gated: bool = True
    joint: bool = False


def linear(x: Tensor, weights: Tensors, name: str) -> Tensor:
    out = x @ weights[f"{name}.weight"].T
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """One head's vector (D,) turned to its position: pairs are (i, i + D/2), as in the released LLaMA weights."""
    half = x.shape[0] // 2
    angle = position / theta ** (2 * torch.arange(half, dtype=x.dtype) / x.shape[0])
    first, second = x[:half], x[half:]
    return torch.cat(
        [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()],
    )


def softmax(scores: list[Tensor]) -> list[Tensor]:
    exps = [torch.exp(score) for score in scores]
    total = torch.stack(exps).sum()
    return [e / total for e in exps]


def weighted(scores: list[Tensor], values: list[Tensor]) -> Tensor:
    return torch.stack([weight * value for weight, value in zip(softmax(scores), values, strict=True)]).sum(0)


def share(scores: list[Tensor], others: list[Tensor]) -> Tensor:
    """What part of a softmax over both the first have."""
    mass, rest = (torch.stack([torch.exp(score) for score in part]).sum() for part in (scores, others))
    return mass / (mass + rest)


def squashed(gate: Tensor, head: int, squash: str, q: Tensor) -> Tensor:
    number = gate[head] if gate.shape[0] > 1 else gate[0]
    if squash == "query":
        number, squash = (number * q).sum(), "tanh"
    return (torch.exp(2 * number) - 1) / (torch.exp(2 * number) + 1) if squash == "tanh" else number


@dataclass(frozen=True)
class Addition:
    """One more prefix on the same model: its prompts by site, (K, C), and its gates by site; for one sample."""

    prompts: Tensors
    gates: Tensors
    squash: str = "tanh"


def added(addition: Addition, q: Tensor, head: int, mine: slice, site: str, weights: Tensors, scale: float) -> Tensor:
    """What one more prefix adds to one head's output for one query (D,)."""
    if site not in addition.prompts:
        return torch.zeros_like(q)
    keys, values = (linear(addition.prompts[site], weights, f"{site}.{part}_proj") for part in "kv")
    scores = [q @ k[mine] * scale for k in keys]
    return squashed(addition.gates[site], head, addition.squash, q) * weighted(scores, [v[mine] for v in values])


def multiplied(q: Tensor, matrix: Tensor) -> Tensor:
    """Prefix-Tuning+'s bias of one head for one query (D,): elu(q) M, entry by entry."""
    features = [number if number > 0 else torch.exp(number) - 1 for number in q]
    return torch.stack([feature * row for feature, row in zip(features, matrix, strict=True)]).sum(0)


def excited(x: Tensor, own: Tensors, prompt_keys: Tensor) -> Tensor:
    """LLaMA-Excitor's additions to the keys of one sample, word by word: (T, C) to (T, G * D)."""
    rows = []
    for word in x:
        asked = own["up"] @ (own["down"] @ word)
        scores = [(asked @ prompt) / math.sqrt(len(word)) for prompt in own["prompts"]]
        rows.append(own["gate"] * weighted(scores, list(prompt_keys)))
    return torch.stack(rows)


def attention(
    x: Tensor,
    visible: list[bool],
    site: str,
    weights: Tensors,
    model: NaiveModel,
    prefix: NaivePrefix,
    adapter: Tensors,
    context: Tensor | None,
    more: Sequence[Addition] = (),
) -> Tensor:
    """(T, C) of one sample to (T, C): what one attention module adds to the residual stream."""
    size, scale = model.head_dim, 1 / math.sqrt(model.head_dim)
    length = x.shape[0]
    query, key, value = (linear(x, weights, f"{site}.{part}_proj") for part in "qkv")
    here = f"tuning.{site}.k_proj."
    own = {name.removeprefix(here): tensor for name, tensor in adapter.items() if name.startswith(here)}
    if own:
        key = key + excited(x, own, linear(own["prompts"], weights, f"{site}.k_proj"))
    prompts = adapter.get(f"{site}.prompt.weight")
    if prompts is not None:
        prompts = prompts if context is None else prompts + context
        prompt_keys, prompt_values = (linear(prompts, weights, f"{site}.{part}_proj") for part in "kv")
    groups = [slice(g * size, (g + 1) * size) for g in range(model.num_kv_heads)]

    def mine_of(head: int) -> slice:
        return groups[head // (model.num_heads // model.num_kv_heads)]

    turned = [[rotate(key[s, mine], s, model.rope_theta) for s in range(length)] for mine in groups]
    rows: list[Tensor] = []
    for t in range(length):
        heads: list[Tensor] = []
        for h in range(model.num_heads):
            group = h // (model.num_heads // model.num_kv_heads)  # neighbouring heads share
            mine = groups[group]
            q = rotate(query[t, h * size : (h + 1) * size], t, model.rope_theta)
            words = [
                s for s in range(t + 1) if visible[s] and (model.sliding_window is None or t - s < model.sliding_window)
            ]
            scores = [q @ turned[group][s] * scale for s in words]
            values = [value[s, mine] for s in words]
            own_scores: list[Tensor] = []
            own_values: list[Tensor] = []
            if prompts is not None:
                own_scores = [q @ k[mine] * scale for k in prompt_keys]
                own_values = [v[mine] for v in prompt_values]
            elif f"{site}.key" in adapter:
                own_scores = [q @ k * scale for k in adapter[f"{site}.key"][group]]
                own_values = list(adapter[f"{site}.value"][group])
            if prefix.joint and not prefix.gated:
                scores, values = own_scores + scores, own_values + values
            out = weighted(scores, values) if scores else torch.zeros(size, dtype=x.dtype)
            if own_scores and scores and prefix.joint and prefix.gated:
                gate = squashed(adapter[f"{site}.gate"], h, prefix.squash, q)
                out = out + gate * share(own_scores, scores) * (weighted(own_scores, own_values) - out)
            if own_scores and not prefix.joint:
                gate = squashed(adapter[f"{site}.gate"], h, prefix.squash, q) if prefix.gated else 1.0
                out = out + gate * weighted(own_scores, own_values)
            if f"{site}.matrix" in adapter:
                gate = squashed(adapter[f"{site}.gate"], h, prefix.squash, q) if prefix.gated else 1.0
                out = out + gate * multiplied(q, adapter[f"{site}.matrix"][h])
            for addition in more:
                out = out + added(addition, q, h, mine_of(h), site, weights, scale)
            heads.append(out)
        rows.append(torch.cat(heads))
    return linear(torch.stack(rows), weights, f"{site}.o_proj")


def naive_logits(
    weights: Tensors,
    model: NaiveModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    prefix: NaivePrefix,
    adapter: Tensors,
    context: Tensor | None = None,
    more: Sequence[Sequence[Addition]] = (),
) -> Tensor:
    """(B, T) to (B, T, vocabulary).

    Args:
        weights: by the names of LLaMA's released checkpoint in transformers' spelling, float64.
        model: shapes.
        input_ids: (B, T).
        attention_mask: (B, T), 1 for words.
        prefix: which variant of the formula.
        adapter: the adapter's tensors by name, float64; layers without any are plain.
        context: (B, 1 or K, C), added to each sample's prompts.
        more: further prefixes of each sample, whose additions sum.
    """
    samples: list[Tensor] = []
    for b in range(input_ids.shape[0]):
        x = weights["model.embed_tokens.weight"][input_ids[b]]
        visible = [bool(word) for word in attention_mask[b]]
        for i in range(model.num_layers):
            layer = f"model.layers.{i}"
            normed = rms_norm(x, weights[f"{layer}.input_layernorm.weight"], model.norm_eps)
            x = x + attention(
                normed,
                visible,
                f"{layer}.self_attn",
                weights,
                model,
                prefix,
                adapter,
                None if context is None else context[b],
                more[b] if more else (),
            )
            normed = rms_norm(x, weights[f"{layer}.post_attention_layernorm.weight"], model.norm_eps)
            up = linear(normed, weights, f"{layer}.mlp.up_proj")
            gated = linear(normed, weights, f"{layer}.mlp.gate_proj")
            x = x + linear(gated / (1 + torch.exp(-gated)) * up, weights, f"{layer}.mlp.down_proj")
        x = rms_norm(x, weights["model.norm.weight"], model.norm_eps)
        head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])  # tied embeddings have one name
        samples.append(x @ head.T)
    return torch.stack(samples)
