"""What metrics of captions have in common: each image has several references, and texts are compared word by word."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice

from zinit.errors import ConfigError
from zinit.metrics.base import SeveralReferences
from zinit.metrics.ptb import ptb_tokens

Words = Sequence[str]
TOKENS: dict[str, Callable[[str], Words]] = {
    "ptb": ptb_tokens,
    "whitespace": str.split,
    "characters": lambda text: "".join(text.split()),
}


class CaptionMetric(SeveralReferences):
    """Compares one predicted caption per image with all that people wrote for it.

    Figures of the literature are over whole sets of images and over the tokens "ptb" (English). For other languages
    there are "whitespace" and "characters", which keep case and punctuation.
    """

    higher_is_better = True

    def _summary(self, predictions: list[str], references: list[list[str]], *, tokens: str = "ptb") -> dict[str, float]:
        if tokens not in TOKENS:
            raise ConfigError(f"{self.name} has no tokens {tokens!r}. Known: {', '.join(map(repr, TOKENS))}.")
        split = TOKENS[tokens]
        for index, captions in enumerate(references):
            if not captions:
                raise ValueError(f"image {index} has no reference; each needs one caption or more")
        return self._figures(
            [split(text) for text in predictions], [[split(text) for text in captions] for captions in references]
        )

    @abstractmethod
    def _figures(self, candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> dict[str, float]:
        """The figures over all images.

        Args:
            candidates: one for each image.
            references: one or more for each image.
        """


def n_grams(words: Words, n: int) -> Counter[tuple[str, ...]]:
    """How often each run of ``n`` words occurs."""
    return Counter(zip(*(islice(words, start, None) for start in range(n)), strict=False))
