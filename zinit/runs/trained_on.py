"""How much of a suite a run was trained on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from zinit.data.records import same_text

if TYPE_CHECKING:
    from zinit.tasks.base import Task


class TrainedOn:
    """Texts and images that a task trained on.

    Args:
        task: of a run, with its training examples.
    """

    def __init__(self, task: Task) -> None:
        by_image: dict[bytes, list[str]] = defaultdict(list)
        texts = []
        for example in (example for stream in task.streams() for example in stream.examples):
            (text,) = same_text(f"{getattr(example, 'prompt', '')} {getattr(example, 'response', '')}")
            texts.append(text)
            for digest in getattr(example, "digests", ()):
                by_image[digest].append(text)
        self._all = "\n".join(texts)
        self._by_image = {digest: "\n".join(own) for digest, own in by_image.items()}

    def image(self, digest: bytes) -> bool:
        """Whether an image was trained on, with any text."""
        return digest in self._by_image

    def text(self, text: str, digest: bytes | None = None) -> bool:
        """Whether a text is part of one that was trained on, white space aside; with an image, of one about it."""
        (words,) = same_text(text)
        return bool(words) and words in (self._all if digest is None else self._by_image.get(digest, ""))

    def count_documents(self, documents: Iterable[dict[str, Any]]) -> int:
        """How many documents of a text benchmark were trained on: the longest of a document's texts decides."""
        longest = (max((t for t in each.values() if isinstance(t, str)), key=len, default="") for each in documents)
        return sum(self.text(text) for text in longest)
