"""What experts say about the images of examples: lines for the input field of a prompt (LLaMA-Adapter V2, 3.4).

As in the paper experts speak at inference alone: of the examples that are held out. What is trained on stays as it is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from zinit.data.images import ImageSource, read_image
from zinit.errors import DataError, first_line
from zinit.experts.base import Expert
from zinit.tasks._images import Digests
from zinit.tasks.alpaca.template import encode_texts

AT_ONCE = 8  # images that an expert is shown together

Said = tuple[tuple[str, str, str], ...]  # of each expert, in order: its name, what stands before its text, its text


class Experts:
    """Experts, and what they have said: an image (with its question, where that matters) is shown once.

    Args:
        experts: in the order of their lines.
    """

    def __init__(self, experts: Sequence[Expert]) -> None:
        self.experts = experts
        self._known: list[dict[tuple[bytes, str], str]] = [{} for _ in experts]

    def __call__(self, asked: Sequence[tuple[Sequence[ImageSource], str]]) -> list[Said]:
        """What they say about each example's images; of several images one after the other.

        Args:
            asked: images and question of each example.

        Raises:
            DataError: if an image cannot be read, or an expert fails, which is named.
        """
        digest_all = Digests()  # not kept: it knows images in memory by their place there
        digests = [digest_all(images) for images, _ in asked]
        found: list[list[tuple[str, str, str]]] = [[] for _ in asked]
        for expert, known in zip(self.experts, self._known, strict=True):
            keys = [
                [(digest, question if expert.by_question else "") for digest in own]
                for own, (_, question) in zip(digests, asked, strict=True)
            ]
            sources = {
                key: image
                for own, (images, _) in zip(keys, asked, strict=True)
                for key, image in zip(own, images, strict=True)
                if key not in known
            }
            for start in range(0, len(sources), AT_ONCE):
                known |= _show(expert, dict(list(sources.items())[start : start + AT_ONCE]))
            for place, own in enumerate(keys):
                found[place].append((expert.name, expert.line, "; ".join(filter(None, (known[key] for key in own)))))
        return [tuple(said) for said in found]


def _show(expert: Expert, sources: Mapping[tuple[bytes, str], ImageSource]) -> dict[tuple[bytes, str], str]:
    """An expert's texts for some images, each on one line."""
    images, questions = [read_image(image) for image in sources.values()], [question for _, question in sources]
    first, *more = sources.values()
    shown = f"{first}{f' and {len(more)} more' if more else ''}"
    try:
        texts = expert(images, questions)
    except Exception as error:  # an expert may be anybody's code
        raise DataError(
            f"the expert {expert.name!r} failed on {shown}: {type(error).__name__}: {first_line(error)}. Mend it, or "
            f"leave it out of task.experts."
        ) from error
    if not isinstance(texts, list | tuple) or len(texts) != len(images) or not all(isinstance(t, str) for t in texts):
        raise DataError(
            f"the expert {expert.name!r} must give a text for each of {len(images)} images ({shown}), '' for nothing; "
            f"got {texts!r:.80}."
        )
    return {key: " ".join(text.split()) for key, text in zip(sources, texts, strict=True)}


def context_lines(said: Said, tokenizer: Any, budget: int) -> tuple[str, Counter[str]]:
    """What experts said as lines for the input field: one for each that said something, in order.

    Args:
        said: see `Experts`.
        tokenizer: of the model.
        budget: tokens of a text; a longer one is cut at its end, between words where there are some.

    Returns:
        The lines, and counts: "expert_NAME" texts, "expert_NAME_cut" of them, "expert_NAME_empty".
    """
    lines, counts = [], Counter[str]()
    for name, line, text in said:
        kept = _cut(text, tokenizer, budget)
        counts.update({f"expert_{name}": bool(kept), f"expert_{name}_cut": kept != text})
        counts[f"expert_{name}_empty"] += not text
        lines += [f"{line}: {kept}"] if kept else []
    return "\n".join(lines), counts


def _cut(text: str, tokenizer: Any, budget: int) -> str:
    def tokens(end: int) -> int:
        return len(encode_texts(tokenizer, [text[:end]])[0])

    if not text or tokens(len(text)) <= budget:
        return text
    end = bisect_right(range(1, len(text) + 1), budget, key=tokens)
    if end < len(text) and not text[end].isspace() and " " in text[:end]:
        end = text.rindex(" ", 0, end)  # no half words
    return text[:end].rstrip(" ,;")
