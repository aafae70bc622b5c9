"""ROUGE-L of captions, which is not that of summaries: best precision and best recall over several references."""

from __future__ import annotations

from collections.abc import Sequence

from zinit.metrics.captions import CaptionMetric, Words

BETA = 1.2  # how much recall counts (Lin, ACL 2004; the value of COCO's evaluation)


class CaptionRougeL(CaptionMetric):
    """The F-measure (beta 1.2) of longest common subsequences of words, averaged over the images, 0 to 1.

    Precision and recall are each that of the reference where it is highest. For the formula of summaries and
    instructions, with one reference, see `rouge_l`.

    Examples:
        >>> CaptionRougeL().compute(predictions=["a cat sat"], references=[["a cat", "cat sat down"]])
        {'caption_rouge_l': 0.836...}
    """

    def _figures(self, candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> dict[str, float]:
        scores = [_f_measure(*image) for image in zip(candidates, references, strict=True)]
        return {self.name: sum(scores) / len(scores)}


def _f_measure(candidate: Words, captions: Sequence[Words]) -> float:
    common = [longest_common(candidate, words) for words in captions]
    if not any(common):
        return 0.0
    precision = max(common) / len(candidate)
    recall = max(count / len(words) for count, words in zip(common, captions, strict=True) if words)
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def longest_common(first: Words, second: Words) -> int:
    """Length of the longest sequence of words that both have in this order."""
    best = [0] * (len(second) + 1)
    for word in first:
        before = best
        best = [0]
        for place, other in enumerate(second):
            best.append(before[place] + 1 if word == other else max(best[place], before[place + 1]))
    return best[-1]
