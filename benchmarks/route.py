"""Time of ``model.generate`` for a batch of many users: an adapter for each sample against one for all.

    python -m benchmarks.route
    python -m benchmarks.route --beams 4 --batch 16

Both run in one process, interleaved, with the same weights; a call includes entering the route, that is, computing
every adapter's keys and values. Before the timing, the routed outputs are compared with those of every adapter alone,
teacher-forced, since random weights leave no margin between two words.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

import zinit
from benchmarks.common import interleaved, parser, prepare, random_llama, ratio, save


@torch.no_grad()
def largest_difference(model: Any, handles: list[zinit.Handle], ids: torch.Tensor) -> float:
    """Of the routed logits to one-by-one runs, relative to the largest logit."""
    with handles[0].route([handle.name for handle in handles]):
        together = model(input_ids=ids, logits_to_keep=1).logits
    worst = 0.0
    for row, handle in enumerate(handles):
        handle.activate()
        alone = model(input_ids=ids[row : row + 1], logits_to_keep=1).logits[0]
        worst = max(worst, float((together[row] - alone).abs().max() / alone.abs().max()))
    return worst


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--batch", type=int, default=64, help="samples, and adapters")
    options.add_argument("--length", type=int, default=64, help="tokens of the prompt")
    options.add_argument("--tokens", type=int, default=32, help="new tokens")
    options.add_argument("--beams", type=int, default=1)
    options.add_argument("--mixed", action="store_true", help="every second adapter has K - 2 prompts")
    options = options.parse_args()
    prepare(options)
    model: Any = random_llama(options).eval()
    handles = [
        zinit.attach(
            model,
            zinit.PrefixConfig(
                length=options.prefix_length - 2 * (options.mixed and number % 2),
                layers=options.adapted,
                gate_init=0.1,
            ),
            name=f"user{number}",
            seed=number,
        )
        for number in range(options.batch)
    ]
    ids = torch.randint(1, options.vocabulary, (options.batch, options.length), device=options.device)
    difference = largest_difference(model, handles, ids)
    handles[0].activate()

    def generation(names: list[str] | None) -> Callable[[], None]:
        def generate() -> None:
            with nullcontext() if names is None else handles[0].route(names):
                model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=options.tokens,
                               min_new_tokens=options.tokens, do_sample=False, num_beams=options.beams)  # fmt: skip

        return generate

    actions = {"one": generation(None), "route": generation([handle.name for handle in handles])}
    seconds = interleaved(actions, rounds=options.rounds, device=options.device)
    figures = {
        "route_over_one": round(ratio(seconds, "route", "one"), 4),
        "largest_difference": difference,
        "median_seconds": {name: round(statistics.median(values), 5) for name, values in seconds.items()},
    }
    save("route", options, figures)


if __name__ == "__main__":
    main()
