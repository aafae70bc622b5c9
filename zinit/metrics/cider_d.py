"""CIDEr-D: agreement of captions, rare n-grams counting most (Vedantam et al., CVPR 2015, section 8)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from zinit.metrics.captions import CaptionMetric, Words, n_grams

LONGEST, SIGMA = 4, 6.0
Vector = dict[tuple[str, ...], float]


class CiderD(CaptionMetric):
    """CIDEr-D, 0 to 10, and ``cider_d_images``: over how many images.

    How rare an n-gram is follows from the references of the very images that are scored. Figures over different
    numbers of images cannot be compared, and over a single one it is 0.

    Examples:
        >>> pairs = {"predictions": ["a cat", "a dog"], "references": [["a cat"], ["the dog"]]}
        >>> CiderD().compute(**pairs)
        {'cider_d': ..., 'cider_d_images': 2}
    """

    def _figures(self, candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> dict[str, float]:
        count, score = len(references), 0.0
        for n in range(1, LONGEST + 1):
            own = [[n_grams(words, n) for words in captions] for captions in references]
            images = Counter(gram for grams in own for gram in set().union(*grams))  # document frequencies
            for candidate, captions, grams in zip(candidates, references, own, strict=True):
                vector = _weigh(n_grams(candidate, n), images, count)
                others = [_weigh(found, images, count) for found in grams]
                alike = sum(
                    _cosine_clipped(vector, other) * math.exp(-((len(candidate) - len(words)) ** 2) / (2 * SIGMA**2))
                    for words, other in zip(captions, others, strict=True)
                )
                score += alike / len(captions)
        return {self.name: 10 * score / (LONGEST * count), f"{self.name}_images": count}


def _weigh(grams: Counter[tuple[str, ...]], images: Mapping[tuple[str, ...], int], count: int) -> Vector:
    """Term frequency times inverse document frequency, as logarithm; an n-gram of no reference counts as one of one."""
    return {gram: often * math.log(count / max(1, images.get(gram, 0))) for gram, often in grams.items()}


def _cosine_clipped(candidate: Vector, reference: Vector) -> float:
    """The cosine, where the candidate gains nothing by repeating an n-gram more often than the reference."""
    shared = [(weight, reference[gram]) for gram, weight in candidate.items() if gram in reference]
    product = sum(min(own, other) * other for own, other in shared)
    norms = math.hypot(*candidate.values()) * math.hypot(*reference.values())
    return product / norms if product else 0.0
