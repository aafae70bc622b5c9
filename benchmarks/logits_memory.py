"""Peak memory and time of the loss over a large vocabulary: all logits, logits where a label exists, chunks of them.

    python -m benchmarks.logits_memory
    python -m benchmarks.logits_memory --width 4096 --layers 32 --heads 32 --kv-heads 8 --batch 8 --length 512

One training step of the same adapted model on the same ragged batch, of which about half of the tokens are prompt.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.common import interleaved, parser, prepare, ratio, save, with_zinit
from benchmarks.train_step import peak_bytes
from zinit.models.losses import chunked_cross_entropy

Loss = Callable[[], torch.Tensor]


def loss_functions(model: Any, options: argparse.Namespace) -> tuple[dict[str, Loss], int]:
    """The summed loss of one ragged batch, computed in three ways; and the number of supervised tokens."""
    device, batch, length = options.device, options.batch, options.length
    ids = torch.randint(0, options.vocabulary, (batch, length), device=device)
    ends = torch.linspace(length // 2, length, batch, device=device).long()[:, None]  # uneven, as real examples are
    column = torch.arange(length, device=device)
    follows = (column >= ends // 2) & (column < ends - 1)
    supervised = follows.flatten().nonzero().squeeze(1)
    targets = ids.flatten()[supervised + 1]
    positions = follows.any(dim=0).nonzero().squeeze(1)

    def full() -> torch.Tensor:
        labels = ids.masked_fill(~(F.pad(follows, (1, 0))[:, :-1]), -100)
        return model(input_ids=ids, labels=labels, use_cache=False, num_items_in_batch=1).loss

    def union() -> torch.Tensor:
        logits = model(input_ids=ids, logits_to_keep=positions, use_cache=False).logits
        chosen = logits[supervised // length, torch.searchsorted(positions, supervised % length)]
        return F.cross_entropy(chosen.float(), targets, reduction="sum")

    def chunked() -> torch.Tensor:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)[supervised]
        return chunked_cross_entropy(hidden, model.lm_head.weight, model.lm_head.bias, targets)

    return {"full": full, "kept": union, "chunked": chunked}, len(targets)


def main() -> None:
    options = parser(str(__doc__).splitlines()[0])
    options.set_defaults(vocabulary=128_000, width=256, layers=4, heads=4, kv_heads=4, rounds=3)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--length", type=int, default=256, help="tokens of the longest example")
    options = options.parse_args()
    prepare(options)
    model = with_zinit(options).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    functions, count = loss_functions(model, options)
    gradients: dict[str, list[torch.Tensor]] = {}
    losses: dict[str, float] = {}

    def step_of(name: str, loss: Loss) -> Callable[[], None]:
        def step() -> None:
            total = loss()
            total.backward()
            losses[name] = total.item()
            gradients[name] = [parameter.grad / count for parameter in trained if parameter.grad is not None]
            model.zero_grad(set_to_none=True)

        return step

    steps = {name: step_of(name, loss) for name, loss in functions.items()}
    seconds = interleaved(steps, rounds=options.rounds, device=options.device)
    memory = {name: peak_bytes(step) for name, step in steps.items()}
    difference = max((a - b).abs().max().item() for a, b in zip(gradients["chunked"], gradients["full"], strict=True))
    figures = {
        "tokens": options.batch * options.length,
        "supervised_tokens": count,
        "step_peak_bytes": memory,
        "full_memory_over_chunked": round(memory["full"] / memory["chunked"], 2),
        "kept_memory_over_chunked": round(memory["kept"] / memory["chunked"], 2),
        "full_time_over_chunked": round(ratio(seconds, "full", "chunked"), 3),
        "kept_time_over_chunked": round(ratio(seconds, "kept", "chunked"), 3),
        "median_seconds": {name: round(statistics.median(values), 5) for name, values in seconds.items()},
        "relative_difference_of_loss": abs(losses["chunked"] - losses["full"]) / losses["full"],
        "largest_difference_of_a_gradient": difference,
    }
    save("logits_memory", options, figures)


if __name__ == "__main__":
    main()
