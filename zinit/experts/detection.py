"""Which objects are in an image, by an object-detection model of transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from PIL import Image

from zinit.errors import ConfigError
from zinit.models.vision import load_detector

SURE = 0.7  # what is kept has a higher score
WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ALIKE = ("sheep", "scissors", "skis")  # COCO's classes with a plural of their own
OTHERWISE = {"person": "people", "mouse": "mice", "knife": "knives"}


class Detector:
    """See the module. The surest kind of object comes first: "two dogs, one ball".

    Args:
        argument: folder or Hub id of the model.
        device: for it.
    """

    name, line, by_question = "detection", "Objects in the picture", False

    def __init__(self, argument: str, *, device: torch.device | str = "cpu") -> None:
        if not argument:
            raise ConfigError("say by what the expert 'detection' detects: detection:FOLDER_OR_HUB_ID.")
        self.model, self.processor = load_detector(argument)
        self.model.to(device)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], questions: Sequence[str] = ()) -> list[str]:
        """See `zinit.experts.base.Expert`."""
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.model.device)
        sizes = [(image.height, image.width) for image in images]
        found = self.processor.post_process_object_detection(self.model(**inputs), threshold=SURE, target_sizes=sizes)
        names = self.model.config.id2label
        return [count_labels([names[n] for n in self._in_order(each)]) for each in found]

    @staticmethod
    def _in_order(found: dict[str, torch.Tensor]) -> list[int]:
        """The classes of what was found, the surest first."""
        return found["labels"][found["scores"].argsort(descending=True, stable=True)].tolist()


def count_labels(labels: Sequence[str]) -> str:
    """Names of objects in words: ``["dog", "ball", "dog"]`` is "two dogs, one ball".

    Args:
        labels: one for each object; the names come in the order in which they are first here.
    """
    return ", ".join(_counted(label, count) for label, count in Counter(labels).items())


def _counted(label: str, count: int) -> str:
    words = WORDS[count] if count < len(WORDS) else str(count)
    return f"{words} {label if count == 1 else _plural(label)}"


def _plural(label: str) -> str:
    start, _, last = label.rpartition(" ")
    if last in ALIKE:
        return label
    ending = "es" if last.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{start} {OTHERWISE.get(last, last + ending)}".strip()
