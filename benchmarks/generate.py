"""Time of ``model.generate``: with an adapter against the base, and PEFT's AdaptionPrompt.

    python -m benchmarks.generate
    python -m benchmarks.generate --width 4096 --layers 32 --heads 32 --kv-heads 32 --vocabulary 32000

Greedy decoding with a KV cache. All three run in one process, interleaved; the figures are medians of ratios within a
round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import interleaved, parser, prepare, random_llama, ratio, save, with_peft, with_zinit


def generation_of(model: Any, ids: torch.Tensor, tokens: int) -> Callable[[], None]:
    model.eval()

    def generate() -> None:
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
                       do_sample=False)  # fmt: skip

    return generate


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--length", type=int, default=64, help="tokens of the prompt")
    options.add_argument("--tokens", type=int, default=64, help="new tokens")
    options = options.parse_args()
    prepare(options)
    ids = torch.randint(1, options.vocabulary, (options.batch, options.length), device=options.device)
    models = (("unadapted", random_llama), ("zinit", with_zinit), ("peft", with_peft))
    actions = {name: generation_of(make(options), ids, options.tokens) for name, make in models}
    seconds = interleaved(actions, rounds=options.rounds, device=options.device)
    figures = {
        "zinit_over_unadapted": round(ratio(seconds, "zinit", "unadapted"), 4),
        "peft_over_zinit": round(ratio(seconds, "peft", "zinit"), 4),
        "median_seconds": {name: round(statistics.median(values), 5) for name, values in seconds.items()},
    }
    save("generate", options, figures)


if __name__ == "__main__":
    main()
