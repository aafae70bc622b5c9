"""Cross-entropy over a large vocabulary that never stores the logits of all tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from zinit.compat import has_forward_hooks

CHUNK_LOGITS = 2**25  # elements in the logits of one chunk: 128 MiB in float32


@torch.compiler.disable()  # a compiler would unroll the loop over chunks
def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, chunk: int | None = None
) -> Tensor:
    """Summed cross-entropy of ``hidden @ weight.T + bias``, computed one chunk of tokens at a time.

    With a frozen output embedding, the gradient of ``hidden`` is computed together with the loss: the backward pass is
    free and the matrix products are those of the plain formula. With a trained one, each chunk is recomputed in the
    backward pass.

    Args:
        hidden: (N, C), the last hidden states at the supervised positions.
        weight: (V, C), the output embedding.
        bias: (V,) or None.
        targets: (N,), the next token at each of them.
        chunk: tokens per chunk; None: as many as give 2**25 logits.

    Returns:
        A scalar, float32. The softmax runs in float32, the matrix products in the dtype of the model (or autocast's).
    """
    chunk = max(1, CHUNK_LOGITS // weight.shape[0]) if chunk is None else chunk
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if trained and torch.is_grad_enabled():
        total = hidden.new_zeros((), dtype=torch.float32)
        for tokens, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            total = total + checkpoint(_cross_entropy, tokens, weight, bias, wanted, use_reentrant=False)  # pyright: ignore[reportOperatorIssue]
        return total
    return _FrozenHead.apply(hidden, weight, bias, targets, chunk)  # pyright: ignore[reportReturnType]


def _cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="sum")


class _FrozenHead(torch.autograd.Function):
    """The loss and, in the same pass, its gradient for the hidden states: (softmax - one-hot) @ weight."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        wants_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wants_gradient else None
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = F.linear(hidden[part], weight, bias)
            log_likelihood = logits.float().log_softmax(dim=-1)
            wanted = targets[part, None]
            total -= log_likelihood.gather(1, wanted).sum()
            if gradient is not None:
                by_logits = log_likelihood.exp_().scatter_add_(1, wanted, log_likelihood.new_full(wanted.shape, -1.0))
                gradient[part] = by_logits.to(logits.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None, None


def split_head(model: nn.Module) -> tuple[nn.Module, nn.Linear] | None:
    """Splits a causal language model into backbone and output embedding, if its logits are just one after the other.

    Some models scale or cap their logits, or wrap the output embedding. So this is tested on a few tokens, with hidden
    states large enough for a cap to show, instead of looked up.

    Args:
        model: of transformers.

    Returns:
        (backbone, output embedding), or None if the logits are computed in any other way.
    """
    base: Any = getattr(model, "base_model", None)
    find_head: Any = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    if base is None or type(head) is not nn.Linear:
        return None
    # A wrapper of the model or its head may do nothing now, but something after the first training step.
    if any("forward" in vars(m) or has_forward_hooks(m) for m in (model, head)):
        return None
    training = model.training
    model.eval()
    try:
        for backbone in (base, base.get_decoder()):  # some models call their backbone's decoder directly
            if backbone is not model and _is_plain(model, backbone, head):
                return backbone, head
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError):
        pass  # no backbone that maps tokens to hidden states
    finally:
        model.train(training)
    return None


@torch.no_grad()
def _is_plain(model: Any, backbone: Any, head: nn.Linear) -> bool:
    """Whether the model's logits are the head applied to the backbone's output for the same tokens."""
    seen: list[tuple[Tensor, Tensor]] = []

    def enlarge(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output.last_hidden_state
        output.last_hidden_state = hidden * (100 / head(hidden).abs().max().clamp_min(1e-6))
        seen.append((hidden, output.last_hidden_state))
        return output

    inputs = {"input_ids": torch.arange(1, 5, device=head.weight.device)[None], "use_cache": False}
    hook = backbone.register_forward_hook(enlarge)
    try:
        logits = model(**inputs).logits
    finally:
        hook.remove()
    if len(seen) != 1:
        return False
    hidden, enlarged = seen[0]
    alone = backbone(**inputs).last_hidden_state
    return torch.allclose(alone, hidden, rtol=1e-2, atol=1e-3 * float(hidden.abs().max())) and torch.allclose(
        head(enlarged).float(), logits.float(), rtol=1e-2, atol=1e-2
    )
