"""ROUGE-L: how much of the expected text the predicted one holds, in the same order."""

from __future__ import annotations

import functools

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

from zinit.errors import ConfigError
from zinit.metrics.base import TextMetric


class RougeL(TextMetric):
    """The F-measure of the longest common subsequence of tokens, by the ``rouge_score`` package.

    Its own tokens are runs of ASCII letters and digits, in lower case: what published figures use, and blind to every
    other script. A text without such tokens scores 0 even against itself, so choose ``tokens`` to suit the language.

    Examples:
        >>> RougeL().compute(predictions=["the cat sat"], references=["the cat sat down"])  # 2 * 3 / (3 + 4)
        {'rouge_l': 0.857...}
    """

    higher_is_better = True

    def score(self, prediction: str, reference: str, *, tokens: str = "ascii", use_stemmer: bool = False) -> float:
        """The F-measure of one pair.

        Args:
            prediction: the model's text.
            reference: the expected text.
            tokens: "ascii" as published; "whitespace" for other scripts that set spaces between words; "characters"
                for those that do not. The last two keep case and punctuation.
            use_stemmer: strip the endings of English words; "ascii" only.

        Raises:
            ConfigError: if there are no such tokens, or they cannot be stemmed.
        """
        return float(_scorer(tokens, use_stemmer).score(reference, prediction)["rougeL"].fmeasure)


class _Whitespace(Tokenizer):
    def tokenize(self, text: str) -> list[str]:
        return text.split()


class _Characters(Tokenizer):
    def tokenize(self, text: str) -> list[str]:
        return list("".join(text.split()))


@functools.cache
def _scorer(tokens: str, use_stemmer: bool) -> RougeScorer:
    others = {"whitespace": _Whitespace, "characters": _Characters}
    if tokens != "ascii" and tokens not in others:
        raise ConfigError(f"rouge_l has no tokens {tokens!r}. Known: 'ascii', 'whitespace', 'characters'.")
    if use_stemmer and tokens != "ascii":
        raise ConfigError(f"rouge_l stems only English, with tokens='ascii'; got tokens={tokens!r}.")
    return RougeScorer(["rougeL"], tokenizer=others[tokens]() if tokens in others else DefaultTokenizer(use_stemmer))
