"""Image classification in VTAB-1k's protocol (arXiv 1910.04867): 1,000 training images, plain resize, linear head."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from zinit.data.images import Images, normalise, thumbnail
from zinit.data.labelled.parts import Labelled, Parts, Reading
from zinit.data.labelled.sources import read_images
from zinit.distributed import map_over_ranks
from zinit.errors import ConfigError, DataError
from zinit.tasks._drift import Drift
from zinit.tasks._linear_probe import solve_head
from zinit.tasks.base import Batch, DataInputs, Evaluation, Stream, Task, TaskInputs
from zinit.tasks.vtab.config import VTABConfig
from zinit.tasks.vtab.facts import VTAB_TASKS, VTABSummary, paper_results, summarise, vpt_grid
from zinit.tasks.vtab.lists import vtab_layout
from zinit.tasks.vtab.split import NAMED, vtab_split

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["VTAB", "VTAB_TASKS", "VTABConfig", "VTABSummary", "paper_results", "summarise", "vpt_grid"]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HEAD_STD = 0.02  # ours; timm draws its own classifiers alike
EVALUATION_BATCH = 64
PUBLISHED = "published"  # in the counts of `read_data`: whether the parts stay as they are


class VTAB(Task):
    """See the module. Needs a backbone of timm's without classifier (``num_classes=0``).

    The head is one linear layer on the pooled features, float32; it starts from N(0, 0.02^2) with bias 0 (ours), so the
    frozen model's accuracy is chance.

    Attributes:
        labels: names of the classes, in the head's order; ``classes`` is the same.
        image_size: (height, width) in pixels.

    Raises:
        DataError: if the data cannot be used; it names file and line.
        ConfigError: if the model cannot take the settings.
    """

    name = "vtab"
    hub_task = "image-classification"
    Config = VTABConfig
    loader = "zinit.models.timm:load_timm"
    baseline = "logistic regression on the frozen model's features"

    def __init__(self, inputs: TaskInputs, config: VTABConfig) -> None:
        super().__init__(inputs, config)
        self.processor = inputs.processor or {}
        self.image_size = _fit_model(self.model, self.processor, config)
        self.mean, self.std = self._normalisation()
        known, training, held_out, counts = self.take_data(inputs, config)
        self._counts = {name: n for name, n in counts.items() if name != PUBLISHED}
        self._published = counts[PUBLISHED]
        self.labels = self.classes = known if inputs.labels is None else list(inputs.labels)
        self._number = {label: index for index, label in enumerate(self.classes)}
        self._check_labels([*training, *held_out])
        self.held_out_examples, self._held_out_images = self._decode(held_out, "held_out")
        tested = frozenset(self._held_out_images.digests)
        # A picture that is tested on is not trained on, whatever its file is called. Published lists stay as they are.
        without = frozenset[bytes]() if self._published else tested
        self.train_examples, self._train_images = self._decode(training, "train", without)
        self._counts["train_skipped_also_held_out"] += len(self._train_images.repeated)
        if both := sum(digest in tested for digest in self._train_images.digests):
            self._counts["train_also_held_out"] = both
        if not self.held_out_examples:
            raise DataError(f"nothing is left to evaluate on: {self.data_report()}.")
        self.train_stream = self._stream("train", self.train_examples)
        self.held_out_stream = self._stream("held_out", self.held_out_examples)
        model: Any = self.model
        width = int(getattr(model, "head_hidden_size", None) or model.num_features)
        self.head = nn.Linear(width, len(self.classes))
        generator = torch.Generator().manual_seed(inputs.seed)
        nn.init.normal_(self.head.weight, std=HEAD_STD, generator=generator)
        nn.init.zeros_(self.head.bias)
        self._drift = Drift()

    def _normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if self.config.normalisation == "none":
            return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if self.config.normalisation == "imagenet":
            return IMAGENET
        if "mean" not in self.processor or "std" not in self.processor:
            raise ConfigError("the model does not say how its input was normalised: -o task.normalisation=imagenet")
        return tuple(self.processor["mean"]), tuple(self.processor["std"])

    @classmethod
    def validation_options(cls, *, demo: bool) -> tuple[str, ...]:
        """VTAB-1k's own: train800, val200."""
        return ("task.split=train800", "task.held_out_data=none")

    @classmethod
    def read_data(
        cls, inputs: DataInputs, config: VTABConfig
    ) -> tuple[list[str], list[Labelled], list[Labelled], dict[str, Any]]:
        """See `vtab_split`; images in files are not opened yet."""
        from zinit import demo

        layout = vtab_layout(config.split, config.dataset)
        fewest, published = 2 if inputs.labels is None else 1, []
        reading = Reading(on_bad=config.on_bad, fields=config.fields, layouts=(layout,), fewest=fewest)

        def read(source: str | None) -> Parts:
            parts = read_images(source, reading, lambda: demo.labelled_images(config.dataset or "digits"))
            published.append(parts.published)
            return parts

        labels, training, held_out, counts = vtab_split(
            inputs.source, config.held_out_data, read, train=inputs.train, split=config.split, seed=inputs.seed
        )
        return labels, training, held_out, {**counts, PUBLISHED: all(published)}

    def _check_labels(self, examples: list[Labelled]) -> None:
        if len(self.classes) < 2:
            raise DataError(f"at least two classes are needed; the data has {', '.join(self.classes) or 'none'}.")
        known = set(self.classes)
        if unknown := sorted({example.label for example in examples} - known):
            example = next(example for example in examples if example.label == unknown[0])
            raise DataError(
                f"{example.where or example.image}: the class {unknown[0]!r} is none of the {len(known)} that are "
                f"trained ({', '.join(self.classes[:5])}{', ...' if len(known) > 5 else ''}); unknown in all: "
                f"{', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}."
            )

    def _decode(
        self, examples: list[Labelled], part: str, without: Collection[bytes] = ()
    ) -> tuple[list[Labelled], Images]:
        """Reads and resizes every image; what cannot be read is named, or counted."""
        height, width = self.image_size
        resample = Image.Resampling[self.config.interpolation.upper()]
        done = 0

        def count(position: int) -> None:
            nonlocal done
            done = position

        try:
            images = Images(
                [example.image for example in examples],
                lambda image: image.resize((width, height), resample),
                on_bad=self.config.on_bad,
                progress=count,
                without=without,
            )
        except DataError as error:
            where = examples[done].where  # images are read in order
            raise DataError(f"{where}: {error}" if where and where not in str(error) else str(error)) from error
        reasons = [f"{examples[i].where}: {why}".removeprefix(": ") for i, why in images.skipped.items()]
        self._counts["reasons"] = (self._counts["reasons"] + reasons)[:NAMED]
        self._counts |= {part: len(images), f"{part}_skipped": len(reasons)}
        if images.turned:
            self._counts[f"{part}_exif_orientation_ignored"] = images.turned
        return [examples[index] for index in images.kept], images

    def _stream(self, name: str, examples: list[Labelled]) -> Stream:
        grid = getattr(getattr(self.model, "patch_embed", None), "num_patches", None) or 1
        return Stream(name=name, lengths=[grid] * len(examples), counts=[1] * len(examples))

    def collate(self, stream: Stream, indices: Sequence[int]) -> Batch:
        """``images`` (B, 3, H, W), uint8 (normalised on the device: a quarter of the transfer), ``labels`` (B,)."""
        train = stream is self.train_stream
        examples, images = (
            (self.train_examples, self._train_images) if train else (self.held_out_examples, self._held_out_images)
        )
        return {
            "images": torch.stack([images[index] for index in indices]),
            "labels": torch.tensor([self._number[examples[index].label] for index in indices]),
        }

    def _pooled(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) to the backbone's pooled features (B, C), float32."""
        dtype = next(self.model.parameters()).dtype
        return self.model(normalise(images, self.mean, self.std).to(dtype)).float()

    def _logits(self, images: Tensor) -> Tensor:
        pooled = self._pooled(images)
        with torch.autocast(pooled.device.type, enabled=False):
            return self.head(pooled)

    def forward(self, batch: Batch) -> Tensor:
        """Cross-entropy, summed over the images."""
        return F.cross_entropy(self._logits(batch["images"]), batch["labels"], reduction="sum")

    def prepare(self) -> None:
        """Starts the head from the frozen features, if that is asked for, and remembers some of them."""
        self._measure_drift()
        if self.config.head_init == "logistic-regression" and len(self.train_stream):
            solve_head(self.head, self.features(self.train_stream), self.train_labels, C=self.config.head_C)

    @torch.no_grad()
    def _measure_drift(self) -> dict[str, float]:
        """How far the features of the first held-out images are from the frozen model's."""
        chosen = range(min(self.config.drift, len(self.held_out_stream)))
        if not chosen:
            return {}
        self.eval()
        images = self.collate(self.held_out_stream, chosen)["images"].to(self.head.weight.device)
        return {"drift": self._drift.measure(self._pooled(images))}

    @contextmanager
    def frozen_baseline(self) -> Iterator[None]:
        """With a head that logistic regression makes of the frozen features, while inside."""
        if not len(self.train_stream):  # only held-out images were read
            yield
            return
        untrained = {name: tensor.clone() for name, tensor in self.head.state_dict().items()}
        solve_head(self.head, self.features(self.train_stream), self.train_labels)
        try:
            yield
        finally:
            self.head.load_state_dict(untrained)

    def baseline_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.head.named_parameters(prefix="head"))

    @torch.no_grad()
    def evaluate(self, accelerator: Accelerator, *, limit: int | None = None) -> Evaluation:
        """Top-1 accuracy, 0 to 1."""
        self.eval()
        count = len(self.held_out_stream) if limit is None else min(limit, len(self.held_out_stream))
        if not count:
            return Evaluation(metrics={})
        predicted = map_over_ranks(accelerator, count, self._predict, batch_size=EVALUATION_BATCH)
        names = [self.classes[label] for label in predicted]
        right = [name == example.label for name, example in zip(names, self.held_out_examples, strict=False)]
        shown = sorted({index * count // 8 for index in range(8)})  # spread: lists are often sorted by class
        samples = [
            {
                "prompt": _title(example, index),
                "image": thumbnail(self._held_out_images[index]),
                "expected": example.label,
                "output": names[index],
            }
            for index in shown
            for example in [self.held_out_examples[index]]
        ]
        return Evaluation(
            metrics={"accuracy": sum(right) / count, **self._measure_drift()},
            counts={"evaluated": count},
            samples=samples,
            examples={"accuracy": [(float(one), 1.0) for one in right]},
        )

    def _predict(self, indices: Sequence[int]) -> list[int]:
        """Class numbers of some held-out images."""
        images = self.collate(self.held_out_stream, indices)["images"].to(self.head.weight.device)
        return self._logits(images).argmax(dim=-1).tolist()

    @torch.no_grad()
    def features(self, stream: Stream) -> Tensor:
        """Pooled features of all examples of a stream, in order: (N, C), float32, on the CPU.

        Args:
            stream: `train_stream` or `held_out_stream`.
        """
        self.eval()
        device = self.head.weight.device
        found = [
            self._pooled(
                self.collate(stream, range(start, min(start + EVALUATION_BATCH, len(stream))))["images"].to(device)
            )
            for start in range(0, len(stream), EVALUATION_BATCH)
        ]
        return torch.cat(found).cpu() if found else torch.zeros(0, self.head.in_features)

    @classmethod
    def over_datasets(cls, results: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """Group means and the two means over all, where the data sets are VTAB-1k's."""
        if not results or not all(name in VTAB_TASKS for name in results):
            return {}
        return summarise({name: metrics["accuracy"] for name, metrics in results.items()}).to_dict()

    @classmethod
    def paper_figure(cls, method: str, dataset: str, metric: str) -> float | None:
        row = {"zero-init": "Zero-init", "full": "Full", "bitfit": "Bias", "bottleneck": "Adapter"}.get(method, "")
        figure = paper_results().get(row, {}).get(dataset) if metric == "accuracy" else None
        return None if figure is None else figure / 100

    @property
    def train_labels(self) -> list[int]:
        """Class numbers of `train_stream`, in order."""
        return [self._number[example.label] for example in self.train_examples]

    def data_report(self) -> dict[str, Any]:
        """``read`` = ``train`` + ``held_out`` + ``not_used`` + everything skipped; why, for the first few."""
        return {**self._counts, "classes": len(self.classes)}

    def fingerprint(self) -> str:
        """Over pixels, labels and how pixels become the model's input."""
        digest = hashlib.sha256(repr((self.classes, self.image_size, self.mean, self.std)).encode())
        for examples, images in (
            (self.train_examples, self._train_images),
            (self.held_out_examples, self._held_out_images),
        ):
            for example, image in zip(examples, images, strict=True):
                digest.update(example.label.encode() + b"\0" + image.numpy().tobytes())
        return digest.hexdigest()


def _title(example: Labelled, index: int) -> str:
    if isinstance(example.image, Path):
        return "/".join(example.image.parts[-2:])
    return example.where or f"image {index + 1}"


def _fit_model(model: Any, processor: dict[str, Any], config: VTABConfig) -> tuple[int, int]:
    """Brings the model to the image's size and drop path; (height, width) in pixels."""
    if getattr(model, "num_classes", None) != 0:
        raise ConfigError(
            f"the task vtab needs a model of timm's without classifier: timm.create_model(..., num_classes=0); got "
            f"{type(model).__name__} with num_classes={getattr(model, 'num_classes', 'none')}."
        )
    own = getattr(getattr(model, "patch_embed", None), "img_size", None) or processor.get("input_size", (3, 224, 224))
    height, width = tuple(own)[-2:]
    size = config.image_size
    if size is not None and (size, size) != (height, width):
        patch = tuple(getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1)))
        if not hasattr(model, "set_input_size"):
            raise ConfigError(f"{type(model).__name__} cannot change its image's size; leave task.image_size out.")
        if size % math.lcm(*patch):
            raise ConfigError(f"image_size must be a multiple of the patch's {patch[0]} pixels; got {size}.")
        with torch.no_grad():
            model.set_input_size(img_size=(size, size))
        height = width = size
    _set_drop_path(model, config.drop_path)
    return height, width


def _set_drop_path(model: Any, rate: float) -> None:
    from timm.layers import DropPath

    places = {
        block: [name for name, part in block.named_children() if name in ("drop_path1", "drop_path2", "drop_path")]
        for block in model.modules()
    }
    places = {block: names for block, names in places.items() if names}
    if rate and not places:
        raise ConfigError(f"{type(model).__name__} has no drop path; set task.drop_path=0.")
    for depth, (block, names) in enumerate(places.items()):
        for name in names:
            setattr(block, name, DropPath(rate * depth / max(1, len(places) - 1)) if rate else nn.Identity())
