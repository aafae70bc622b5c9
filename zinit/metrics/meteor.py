"""METEOR of captions, by its authors' program, which needs Java."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Sequence
from typing import Any

from zinit.errors import ConfigError, install_extra
from zinit.metrics.captions import CaptionMetric, Words


class Meteor(CaptionMetric):
    """METEOR 1.5 over all images, 0 to 1: words matched by form, stem, synonym and paraphrase (English).

    The program comes with the package ``pycocoevalcap``; Java runs it.

    Raises:
        ConfigError: if the package or Java is missing; it says which.
    """

    def _figures(self, candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> dict[str, float]:
        program = check_meteor()()
        try:
            score, _ = program.compute_score(
                {number: [" ".join(words) for words in captions] for number, captions in enumerate(references)},
                {number: [" ".join(words)] for number, words in enumerate(candidates)},
            )
        except (ValueError, OSError) as error:  # it died, or answered in words
            raise ConfigError(f"METEOR's Java program gave no figures ({error}). Does 'java -version' work?") from error
        return {self.name: score}


def check_meteor() -> Any:
    """The class that talks to METEOR's program.

    Raises:
        ConfigError: if its package or Java is missing.
    """
    if shutil.which("java") is None:
        raise ConfigError("METEOR needs Java, and there is no 'java' on the path. Install a Java runtime (8 or later).")
    try:
        return importlib.import_module("pycocoevalcap.meteor.meteor").Meteor
    except ImportError as error:
        raise ConfigError(f"METEOR needs the package pycocoevalcap. {install_extra('meteor')}") from error
