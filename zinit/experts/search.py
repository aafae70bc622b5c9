"""What a user's own function finds about an image and a question: a search engine, a knowledge base."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image

from zinit.errors import ConfigError
from zinit.registry import import_object


class Search:
    """See the module.

    Args:
        argument: address of the function, ``"package.module:function"``; it takes an image in RGB and the question, and
            returns a text, which may be empty.
        device: not used.
    """

    name, line, by_question = "search", "Found about the picture", True

    def __init__(self, argument: str, *, device: torch.device | str = "cpu") -> None:
        module, _, attribute = argument.partition(":")
        if not module or not attribute:
            raise ConfigError(
                f"the expert 'search' needs the address of a function of yours, search:MODULE:FUNCTION; got "
                f"{f'search:{argument}' if argument else 'search'!r}."
            )
        try:
            self.find: Callable[[Image.Image, str], str] = import_object(argument)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(
                f"the expert 'search' cannot import {argument!r}: {error}. Its module must be installed, or lie in a "
                f"folder that PYTHONPATH names."
            ) from error
        if not callable(self.find):
            raise ConfigError(f"{argument!r} is a {type(self.find).__name__}; the expert 'search' needs a function.")

    def __call__(self, images: Sequence[Image.Image], questions: Sequence[str] = ()) -> list[str]:
        """See `zinit.experts.base.Expert`."""
        return [self.find(image, question) for image, question in zip(images, questions, strict=True)]
