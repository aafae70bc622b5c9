"""Zero-init attention: the formula, and nothing else.

Shapes: B batch, T queries, S words, H query heads, G key/value heads (G divides H), D head width, K prefix length,
C model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zinit.config import LEARNED, PrefixConfig
from zinit.errors import BackboneError, ConfigError

ProjectKV = Callable[[Tensor], tuple[Tensor, Tensor]]
"""The host's frozen key and value projections: (K, C) or (B, K, C) to two of (1 or B, G, K, D)."""


@dataclass(frozen=True, eq=False)
class Context:
    """Prompts, or additions to them, that come with a call: one set for each sample.

    Attributes:
        tokens: (B, 1 or K, C).
        present: (B,) boolean, which samples have one; None is all. Absent samples get exactly nothing from it.
    """

    tokens: Tensor
    present: Tensor | None = None

    def for_present(self, x: Tensor) -> Tensor:
        """(B, ...) with exact zeros where the sample has no context."""
        if self.present is None:
            return x
        present = self.present.to(x.device).view(-1, *[1] * (x.dim() - 1))
        return torch.where(present, x, torch.zeros((), dtype=x.dtype, device=x.device))


class PromptSource(Protocol):
    """Where the prompts of one attention module come from: a table of its own, a shared network, the call alone."""

    def __call__(self, context: Context | None = None) -> Tensor:
        """(K, C), or (B, K, C) with a context."""
        ...


class PromptTable(nn.Module):
    """K learned prompts of width C, to which a context may be added (Eq. 10 of the paper)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, context: Context | None = None) -> Tensor:
        """(K, C); or (B, K, C) with a context of (B, 1 or K, C)."""
        return self.weight if context is None else self.weight + context.for_present(context.tokens)


class GivenPrompts:
    """Nothing is learned here: the prompts are the context's tokens."""

    def __call__(self, context: Context | None = None) -> Tensor:
        """(B, K, C)."""
        if context is None:
            raise ConfigError("a part with prompt='context' was called without one; pass it with handle.context(...).")
        return context.for_present(context.tokens)


class ZeroGatedPrefix(nn.Module):
    r"""Adds ``act(g_h) * softmax(q_h P_k^T * scale) P_v`` to head ``h`` of a frozen attention's output.

    LLaMA-Adapter (ICLR 2024), Eq. 5-8, in the form of a sum: the words' attention stays exactly the pretrained one,
    the K prompts have a softmax of their own in float32, and only their part is gated. The host projects the sum.

        o_h  =  softmax(q_h k^T * scale + mask) v   +   act(g_h) * softmax(q_h P_k^T * scale) P_v
                the host's, untouched                   this module;  P_k = W_k P,  P_v = W_v P

    P_k and P_v come from the prompts P through the host's frozen projections, neither normalised nor rotated. Every
    query sees every prompt: prompts take no position and no mask.

    Invariant: with gate 0 and finite keys and values the addition is exactly zero in every dtype.
    Gradient: while the gate is 0 only the gate has one; the prompts' is exactly zero until the gate has moved.
    Departure from the paper's Eq. 5: the scale is the host's, 1/sqrt(D), as in the reference code, not 1/sqrt(C).
    With ``gate="query"`` (arXiv 2502.03029) act(g_h) is tanh(q_h w_h), a gate for each query, and w_h (D,) is learned.
    There q_h is not rotated yet; here it is the query that the host hands over, which is another function.
    With ``parametrization="matrix"`` (Prefix-Tuning+, arXiv 2506.13674) the addition is act(g_h) elu(q_h) M_h: what is
    learned is M_h (D, D), in the place of what prompts would sum up to under a softmax made linear. Ours are elu, the
    query as it is handed over, unscaled, and that M may start at zero (``init_std=0``).
    With ``separate_softmax=False`` prompts and words share one softmax. Without a gate that is plain prefix tuning; the
    gate leads there from the host's output, see `toward`. A backbone attends twice for it; it is ours.
    Parameters are float32 whatever the host's dtype. The module holds no reference to its host.

    Args:
        config: K, gate and ablations.
        width: C.
        num_heads: H.
        num_kv_heads: G.
        head_dim: D.
        value_dim: width of a value head where it is not D.
        device: where the parameters live.
        generator: a CPU generator that the random start is drawn from (default: torch's own).
        prompts: a source of prompts that somebody else owns (a network shared by several layers); its parameters are
            not this module's. Default: a table, or nothing but the context where the config says so.

    Raises:
        ConfigError: if G does not divide H.
    """

    prompt: PromptSource

    def __init__(
        self,
        config: PrefixConfig,
        *,
        width: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        prompts: PromptSource | None = None,
    ) -> None:
        super().__init__()
        if num_heads % num_kv_heads:
            raise ConfigError(f"{num_heads} query heads cannot share {num_kv_heads} key/value heads evenly.")
        self.config = config
        self.width, self.num_heads, self.num_kv_heads = width, num_heads, num_kv_heads

        def normal(*shape: int) -> Tensor:  # drawn on the CPU, so a seed means the same on every device
            if device is not None and torch.device(device).type == "meta":
                return torch.empty(shape, device="meta")
            return torch.empty(shape, device="cpu").normal_(generator=generator).to(device)

        if prompts is not None:
            vars(self)["prompt"] = prompts  # a plain attribute: a module would be registered, saved and counted here
        elif config.prompt == "context":
            self.prompt = GivenPrompts()
        elif config.parametrization == "prompt":
            self.prompt = PromptTable(config.init_std * normal(config.length, width))
        elif config.parametrization == "matrix":
            self.matrix = nn.Parameter(config.init_std * normal(num_heads, head_dim, value_dim or head_dim))
        else:
            self.key = nn.Parameter(config.init_std * normal(num_kv_heads, config.length, head_dim))
            self.value = nn.Parameter(config.init_std * normal(num_kv_heads, config.length, value_dim or head_dim))
        self.by_query = config.gating and config.gate == "query"
        if config.gating:
            start = normal(num_heads if config.gate_per == "head" else 1, *[head_dim] * self.by_query)
            self.gate = nn.Parameter(
                start if isinstance(config.gate_init, str) else torch.full_like(start, config.gate_init)
            )
        self.last_gates = torch.full((num_heads,), math.nan)  # of gates by query, in the last forward pass

    def gates(self) -> Tensor:
        """(H,) gates after squashing: what each head's prompt attention is multiplied by. Ones without gating.

        Of gates by query the mean of |g| over the last forward pass, padding included; NaN before one, and where it ran
        compiled.
        """
        if self.by_query:
            return self.last_gates
        if not self.config.gating:
            return next(self.parameters()).new_ones(self.num_heads)
        return (self.gate.tanh() if self.config.gate == "tanh" else self.gate).expand(self.num_heads)

    def check_context(self, context: Tensor | Context) -> Context:
        """A context is (B, 1 or K, C), or (B, K, C) where it is all the prompts there are.

        Returns:
            The context; a bare tensor is one that every sample has.

        Raises:
            ConfigError: if it does not fit.
        """
        context = context if isinstance(context, Context) else Context(context)
        if self.config.parametrization != "prompt":
            learned = LEARNED[self.config.parametrization]
            raise ConfigError(f"learned {learned} take no context; use parametrization='prompt'.")
        length, shape = self.config.length, tuple(context.tokens.shape)
        counts = (length,) if self.config.prompt == "context" or length == 1 else (1, length)
        if len(shape) != 3 or shape[1] not in counts or shape[2] != self.width:
            allowed = " or ".join(map(str, counts))
            raise ConfigError(f"a context must be (batch, {allowed}, {self.width}); got {shape}.")
        if context.present is not None and tuple(context.present.shape) != shape[:1]:
            raise ConfigError(
                f"a context's present must be ({shape[0]},), one for each sample; got {tuple(context.present.shape)}."
            )
        return context

    def keys_values(
        self, project: ProjectKV, dtype: torch.dtype, context: Tensor | Context | None = None
    ) -> tuple[Tensor, Tensor]:
        """All that does not depend on the text: the prompts' keys and values, each (1 or B, H, K, D).

        The values are gated: multiplying them by the gate instead of the attention weights is the same function, since
        a gate is one number per head, and costs K x D instead of T x K multiplications. A gate by query is applied
        later, in the forward pass, and so is that of a shared softmax, whose heads stay grouped: (1 or B, G, K, D).
        Matrices stand for the values, (1, H, D, D), and there are no keys, (1, H, 0, D).

        Raises:
            ConfigError: if the context does not fit.
        """
        if context is not None:
            context = self.check_context(context)
        if self.config.parametrization == "prompt":
            key, value = project(self.prompt(context).to(dtype))
        elif self.config.parametrization == "matrix":
            key, value = self.matrix[None, :, :0], self.matrix[None]
        else:
            key, value = self.key[None], self.value[None]
        if context is not None and self.config.prompt == "context":
            value = context.for_present(value)  # a projection's bias must not speak for an absent sample
        if self.config.separate_softmax:
            shared_by = self.num_heads // key.shape[1]
            key, value = key.repeat_interleave(shared_by, dim=1), value.repeat_interleave(shared_by, dim=1)
            if self.config.gating and not self.by_query:
                value = self.gates().view(-1, 1, 1) * value
        return key.to(dtype), value.to(dtype)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """The addition to the host's attention output, before its output projection.

        Args:
            query: (B, H, T, D), the host's own, rotated where the host rotates.
            key: (1 or B, H, K, D) from `keys_values`.
            value: (1 or B, H, K, D) from `keys_values`, gated.
            scale: the host's factor on the scores.

        Returns:
            (B, H, T, D). The softmax runs in float32 inside torch's fused kernels.

        Raises:
            BackboneError: with a softmax shared by prompts and words, which no addition can make (see `concat_prefix`).
        """
        if not self.config.separate_softmax:
            raise BackboneError(
                "the model's backbone does not support prefix tuning (separate_softmax=False): it adds the prompts' "
                "attention to the words'. Leave separate_softmax at True, or see `zinit.prefix.concat_prefix`."
            )
        matrix = self.config.parametrization == "matrix"
        addition = multiply_by_matrix(query, value) if matrix else attend_prompts(query, key, value, scale)
        return self._gate_by_query(query) * addition if self.by_query else addition

    def toward(self, query: Tensor, own: Tensor, shared: Tensor) -> Tensor:
        """The addition where prompts and words share one softmax: ``act(g_h) (shared - own)``.

        It leads the host's output, at gate 0, to plain prefix tuning's, at gate 1. With Z_w and Z_p what words and
        prompts sum up to in the softmax it is act(g_h) Z_p / (Z_w + Z_p) (softmax(q_h P_k^T) P_v - own): each query
        weighs the prompts by itself.

        Args:
            query: (B, H, T, D), as for `forward`.
            own: (B, H, T, D), the attention to the words alone.
            shared: (B, H, T, D), that to prompts and words, of `concat_prefix`. Neither has dropout: what they differ
                by is to come from the prompts.

        Returns:
            (B, H, T, D); with a gate of zero exactly zero.
        """
        gate = self._gate_by_query(query) if self.by_query else self.gates().view(-1, 1, 1).to(own.dtype)
        return gate * (shared - own)

    def _gate_by_query(self, query: Tensor) -> Tensor:
        """(B, H, T, 1); what `gates` shows of them is noted."""
        gates = gates_by_query(query, self.gate)
        if not torch.compiler.is_compiling():
            self.last_gates = gates.detach().abs().mean((0, 2, 3)).float()
        return gates


def gates_by_query(query: Tensor, weight: Tensor) -> Tensor:
    """``tanh(q_h w_h)``: (B, H, T, D) and (1 or H, D), or (B, H, D), to (B, H, T, 1)."""
    return (query @ weight.to(query.dtype)[..., None]).tanh()


def attend_prompts(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """``softmax(q P_k^T * scale + mask) P_v``, see `ZeroGatedPrefix.forward`.

    Args:
        query: (B, H, T, D).
        key: (1 or R, H, K, D); R samples fit a batch of B = R * beams.
        value: as ``key``.
        scale: the host's.
        mask: (R, 1, 1, K), added to the scores: where prefixes of several lengths are padded to one.
    """
    if mask is not None:
        mask = for_each_sample(mask, query)
    key, value = for_each_sample(key, query), for_each_sample(value, query)
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)


def multiply_by_matrix(query: Tensor, matrix: Tensor) -> Tensor:
    """``elu(q_h) M_h``: (B, H, T, D) and (1 or R, H, D, D) to (B, H, T, D); see `ZeroGatedPrefix`."""
    return F.elu(query) @ for_each_sample(matrix, query)


def for_each_sample(x: Tensor, query: Tensor) -> Tensor:
    """Spreads (1 or B, ...) over the batch of ``query``, in its dtype; beams of one sample lie side by side there.

    Raises:
        ConfigError: if the batch is no multiple of B.
    """
    batch = query.shape[0]
    if x.shape[0] == batch and x.dtype == query.dtype:  # one sample, one token: here every call counts
        return x
    x = x.to(query.dtype)
    if x.shape[0] == 1:
        return x.expand(batch, -1, -1, -1)
    if batch % x.shape[0]:
        raise ConfigError(f"a context for {x.shape[0]} samples does not fit a batch of {batch}: give one for each.")
    return x if x.shape[0] == batch else x.repeat_interleave(batch // x.shape[0], dim=0)


def concat_prefix(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, prefix: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Plain prefix tuning: prompts in front of the words, so that the host's one softmax covers both.

    Args:
        query: (B, H, T, D).
        key: (B, G, S, D) of the words; ``value`` alike.
        value: see ``key``.
        mask: (B or 1, H or 1, T, S), boolean (True is visible) or additive, or None.
        causal: without a mask, whether word queries see earlier words only.
        prefix: keys and values of the prompts, (1 or B, G, K, D).

    Returns:
        Keys and values (B, G, K + S, D), and a mask that shows every prompt to every query.
    """
    prompt_key, prompt_value = (for_each_sample(x, query) for x in prefix)
    queries, words, length = query.shape[2], key.shape[2], prompt_key.shape[2]
    if mask is None and causal and queries > 1:
        mask = torch.ones(queries, words, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None:
        mask = F.pad(mask[..., :words], (length, 0), value=1 if mask.dtype == torch.bool else 0)
    return torch.cat([prompt_key, key], dim=2), torch.cat([prompt_value, value], dim=2), mask
