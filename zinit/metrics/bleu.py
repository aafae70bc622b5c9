"""BLEU of captions: n-grams of the candidate that some reference has (Papineni et al., ACL 2002)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from zinit.metrics.captions import CaptionMetric, Words, n_grams

LONGEST = 4


class Bleu(CaptionMetric):
    """BLEU-1 to BLEU-4 over all images together, as captions are scored: without smoothing, 0 to 1.

    The brevity penalty takes of each image the reference whose length is closest, the shorter of two.

    Examples:
        >>> Bleu().compute(predictions=["a black cat"], references=[["a black dog", "the cat"]])["bleu_1"]
        1.0
    """

    def _figures(self, candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> dict[str, float]:
        matched, total = [0] * LONGEST, [0] * LONGEST
        length = closest = 0
        for candidate, captions in zip(candidates, references, strict=True):
            length += len(candidate)
            closest += min((abs(len(words) - len(candidate)), len(words)) for words in captions)[1]
            for place in range(LONGEST):
                counts = n_grams(candidate, place + 1)
                own = [n_grams(words, place + 1) for words in captions]
                matched[place] += sum(min(often, max(grams[gram] for grams in own)) for gram, often in counts.items())
                total[place] += counts.total()
        penalty = min(1.0, math.exp(1 - closest / length)) if length else 0.0
        product, figures = 1.0, {}
        for n, (right, of) in enumerate(zip(matched, total, strict=True), start=1):
            product *= right / of if of else 0.0
            figures[f"bleu_{n}"] = penalty * product ** (1 / n)
        return figures
