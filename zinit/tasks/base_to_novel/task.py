"""CLIP's generalisation from base to novel classes (LLaMA-Adapter, ICLR 2024, Table 14; protocol of CoOp and CoCoOp).

The classes are sorted; the first half is the base, trained on with a few images each, the rest is novel. Each half is
tested among its own classes only. The classifier of a class is the text tower's reading of "a photo of a <class>.", so
there is no head, and the frozen model's evaluation is zero-shot CLIP.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from zinit.data.crops import Views, plain
from zinit.data.images import Images, ImageSource, normalise, thumbnail
from zinit.data.labelled.few_shot import UNREADABLE, draw_shots, few_shot_split
from zinit.data.labelled.parts import Labelled, Parts, Reading
from zinit.data.labelled.sources import read_images
from zinit.distributed import is_shard, map_over_ranks
from zinit.errors import DataError
from zinit.models.room import positions
from zinit.tasks.base import Batch, DataInputs, Evaluation, Stream, Task, TaskInputs
from zinit.tasks.base_to_novel.config import BaseToNovelConfig
from zinit.tasks.base_to_novel.table import harmonic_mean, paper_results, summarise

if TYPE_CHECKING:
    from accelerate import Accelerator


Half = Literal["base", "novel"]
HALVES: tuple[Half, Half] = ("base", "novel")
TOWERS = {"text": "text", "vision": "vis"}  # how the names of a tower's parameters start (visual_projection is one)
TRAIN_COUNTS = ("train", "train_views", "train_not_drawn", UNREADABLE, "train_of_novel_classes")
PUBLISHED = "published"  # in the counts of `read_data`: whether the parts stay as they are
BATCH = 64  # images, or texts, per forward pass without gradients


class BaseToNovel(Task):
    """See the module. Needs CLIP, or another model with ``get_image_features``, ``get_text_features``, ``logit_scale``.

    Attributes:
        labels: names of all classes in label order, base classes first.
        classes: names of each half's classes.
    """

    name = "base-to-novel"
    hub_task = "zero-shot-image-classification"
    Config = BaseToNovelConfig
    loader = "zinit.models.loading:load_clip"
    baseline = "zero-shot: the frozen model"
    metric = "harmonic_mean"

    def __init__(self, inputs: TaskInputs, config: BaseToNovelConfig) -> None:
        super().__init__(inputs, config)
        host: Any = self.model.config
        self.size = int(host.vision_config.image_size)
        labels, training, tested, counts = self.take_data(inputs, config)
        self.labels, self._counts = labels, {name: n for name, n in counts.items() if name != PUBLISHED}
        self._published = counts[PUBLISHED]
        self._counts |= dict.fromkeys((*TRAIN_COUNTS, "test_skipped_unreadable"), 0)
        if inputs.labels is None:  # those of a finished run were trained on as they are
            self._check_names(labels)
        middle = (len(labels) + 1) // 2
        self.classes: dict[Half, list[str]] = {"base": labels[:middle], "novel": labels[middle:]}
        self._tested = {half: self._open(tested, self.classes[half]) for half in HALVES}
        digests = frozenset(digest for images, _ in self._tested.values() for digest in images.digests)
        sources, self._train_labels = self._draw(training, inputs.seed, digests) if inputs.train else ([], [])
        if config.views > 1:
            crop = {"size": self.size, "smallest": config.crop_scale, "seed": inputs.seed}
            self._train = Views(sources, views=config.views, **crop)
        else:
            self._train = Images(sources, self._prepare)
        self._train_labels *= config.views
        if both := sum(digest in digests for digest in self._train.digests):
            self._counts["train_also_held_out"] = both
        if turned := self._train.turned + sum(images.turned for images, _ in self._tested.values()):
            self._counts["exif_orientation_ignored"] = turned
        for half in HALVES:
            self._counts[f"{half}_classes"] = len(self.classes[half])
            self._counts[f"{half}_test"] = len(self._tested[half][0])
            self._counts[f"{half}_classes_without_test"] = len(self.classes[half]) - len(set(self._tested[half][1]))
            if not self._tested[half][0]:
                names = self.classes[half]
                raise DataError(
                    f"there is no image to test on of the {half} classes, {', '.join(names[:5])}"
                    f"{', ...' if len(names) > 5 else ''} (read: {self._counts['read']}, skipped as unreadable: "
                    f"{self._counts['test_skipped_unreadable']}). The harmonic mean takes both halves: give images of "
                    f"base and of novel classes."
                )
            for key, tokens in self._tokenise(self.classes[half]).items():
                self.register_buffer(f"_{half}_{key}", tokens, persistent=False)
        self._counts["held_out"] = self._counts["base_test"] + self._counts["novel_test"]
        patches = (self.size // int(getattr(host.vision_config, "patch_size", 16))) ** 2
        self.train_stream = Stream(name="train", lengths=[patches] * len(self._train), counts=[1] * len(self._train))
        held_out = len(self._tested["base"][0])
        self.held_out_stream = Stream(name="held_out", lengths=[patches] * held_out, counts=[1] * held_out)
        self._text_features: dict[Half, tuple[Any, Tensor]] = {}
        self._known: Tensor | None = None  # which images' features are kept
        self._kept: Tensor | None = None

    # --- data -----------------------------------------------------------------------------------------------------

    def _prepare(self, image: Any) -> Any:
        return plain(image, self.size)

    @classmethod
    def read_data(
        cls, inputs: DataInputs, config: BaseToNovelConfig
    ) -> tuple[list[str], list[Labelled], list[Labelled], dict[str, int]]:
        """See `few_shot_split`; images in files are not opened yet."""
        from zinit import demo

        how = Reading(
            on_bad=config.on_bad,
            fields=config.fields,
            named=True,
            folder=config.folder,
            fewest=2 if inputs.labels is None else 1,
        )
        published = []

        def read(source: str | None) -> Parts:
            parts = read_images(source, how, demo.base_to_novel)
            published.append(parts.published)
            return parts

        labels, training, tested, counts = few_shot_split(
            inputs.source,
            config.held_out_data,
            read,
            train=inputs.train,
            labels=inputs.labels,
            dropped=config.drop_classes,
            seed=config.split_seed,
        )
        if len(labels) < 4:
            raise DataError(f"base and novel classes need at least two each; the data has {', '.join(labels)}.")
        return labels, training, tested, {**counts, PUBLISHED: all(published)}

    def _draw(
        self, training: list[Labelled], seed: int, tested: Collection[bytes]
    ) -> tuple[list[ImageSource], list[int]]:
        """The shots of the base classes, and their labels.

        A picture that is tested on is not drawn, whatever its file is called. Published lists stay as they are.
        """
        config = self.config
        number = {name: label for label, name in enumerate(self.classes["base"])}
        mine = [example for example in training if example.label in number]
        without = () if self._published else tested
        drawn, counts = draw_shots(
            mine, config.shots, list(number), seed=seed, few=config.few, on_bad=config.on_bad, held_out=without
        )
        self._counts |= {
            "train": len(drawn),
            "train_views": len(drawn) * config.views,
            "train_of_novel_classes": len(training) - len(mine),
            **counts,
        }
        return [example.image for example in drawn], [number[example.label] for example in drawn]

    def _open(self, tested: list[Labelled], names: list[str]) -> tuple[Images, list[int]]:
        """The images of some classes, decoded, and their labels among these."""
        number = {name: label for label, name in enumerate(names)}
        mine = [example for example in tested if example.label in number]
        opened = Images([example.image for example in mine], self._prepare, on_bad=self.config.on_bad)
        self._counts["test_skipped_unreadable"] += len(opened.skipped)
        return opened, [number[mine[position].label] for position in opened.kept]

    def _check_names(self, names: Sequence[str]) -> None:
        """The text tower reads every class's name, and tells it from the others.

        Raises:
            DataError: naming two classes with the same tokens, or one that is read as nothing.
        """
        prompts = self._prompts(names)
        ids = self.processor.tokenizer(prompts, split_special_tokens=True)["input_ids"]
        size, seen = len(self.config.template), dict[str, str]()
        for index, name in enumerate(names):
            if not _spoken(name):
                raise DataError(f"the class {name!r} has no name that could be read. Rename it.")
            first = seen.setdefault(repr(ids[index * size : (index + 1) * size]), name)
            if first != name:
                raise DataError(
                    f"the text tower cannot tell the classes {first!r} and {name!r} apart: it reads the same tokens "
                    f"for both, those of {prompts[index * size]!r}. Rename one of them, or leave it out: "
                    f"-o task.drop_classes={name}"
                )

    def _prompts(self, names: Sequence[str]) -> list[str]:
        """What is read for every class, its templates next to each other."""
        return [text.replace("{}", _spoken(name)) for name in names for text in self.config.template]

    def _tokenise(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Prompts of every class, its templates next to each other: (classes x templates, T)."""
        prompts = self._prompts(names)
        room, padding = positions(self.model), self.processor.padding
        size = {"max_length": room} if padding == "max_length" else {}
        encoded = self.processor.tokenizer(
            prompts, padding=padding, **size, return_tensors="pt", split_special_tokens=True
        )
        longest = int(encoded["input_ids"].shape[1])
        if room is not None and longest > room:
            raise DataError(
                f"a prompt has {longest} tokens, but the text tower has room for {room}: {max(prompts, key=len)!r}. "
                f"Shorten task.template or the class's name."
            )
        return {key: encoded[key] for key in ("input_ids", "attention_mask") if key in encoded}

    def collate(self, stream: Stream, indices: Sequence[int]) -> Batch:
        """``pixels`` uint8 (B, 3, size, size), ``labels`` (B,) and ``index`` (B,), among all images."""
        if stream is self.train_stream:
            return self._batch(self._train, self._train_labels, indices, 0)
        return self._batch(*self._tested["base"], indices, len(self._train))

    def _batch(self, images: Sequence[Tensor], labels: list[int], indices: Sequence[int], offset: int) -> Batch:
        return {
            "pixels": torch.stack([images[index] for index in indices]),
            "labels": torch.tensor([labels[index] for index in indices]),
            "index": torch.tensor([offset + index for index in indices]),
        }

    # --- model ----------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> Tensor:
        """Cross-entropy of the images among the base classes, summed."""
        return F.cross_entropy(self.logits(batch, "base"), batch["labels"], reduction="sum")

    def logits(self, batch: Batch, half: Half) -> Tensor:
        """CLIP's scaled cosines of images with the classes of one half: (B, classes), float32.

        Args:
            batch: of `collate`.
            half: whose classes compete.
        """
        scale: Any = self.model.logit_scale
        images, classes = self.image_features(batch), self.class_features(half)
        with torch.autocast(images.device.type, enabled=False):
            return scale.float().exp() * images @ classes.T

    def class_features(self, half: Half) -> Tensor:
        """Unit features of the classes of one half: (classes, D), float32. Kept while the text tower cannot change."""
        if self._may_change("text"):
            return self._encode_classes(half)
        tokens = getattr(self, f"_{half}_input_ids")
        state = (tokens.device, self.training)
        if half not in self._text_features or self._text_features[half][0] != state:
            with torch.no_grad():
                self._text_features[half] = (state, self._encode_classes(half))
        return self._text_features[half][1]

    def image_features(self, batch: Batch) -> Tensor:
        """Unit features of images: (B, D), float32. Kept while the vision tower cannot change.

        Not those of a sharded tower: all processes must call it equally often, and each has seen other images.
        """
        if self._may_change("vision") or any(map(is_shard, self.model.parameters())):
            return self._encode_images(batch["pixels"])
        index, pixels = batch["index"], batch["pixels"]
        if self._known is None or self._known.device != index.device:
            count = len(self._train) + sum(len(images) for images, _ in self._tested.values())
            self._known, self._kept = torch.zeros(count, dtype=torch.bool, device=index.device), None
        new = ~self._known[index]
        if self._kept is None or new.any():
            with torch.no_grad():
                features = self._encode_images(pixels[new])
            if self._kept is None:
                self._kept = features.new_zeros(len(self._known), features.shape[1])
            self._kept[index[new]], self._known[index[new]] = features, True
        return self._kept[index]

    def _may_change(self, tower: str) -> bool:
        """Whether a tower's features may differ from call to call: it trains, or a prefix in it goes on and off."""
        others = tuple(start for name, start in TOWERS.items() if name != tower)
        return any(
            (parameter.requires_grad or "zinit" in name.split("."))
            and not name.startswith((*others, "logit_scale", "logit_bias"))
            for name, parameter in self.model.named_parameters()
        )

    def _encode_images(self, pixels: Tensor) -> Tensor:
        model: Any = self.model
        values = normalise(pixels, self.processor.mean, self.processor.std).to(model.logit_scale.dtype)
        return _unit(model.get_image_features(pixel_values=values))

    def _encode_classes(self, half: Half) -> Tensor:
        model: Any = self.model
        keys = ("input_ids", "attention_mask")
        tokens = {key: getattr(self, f"_{half}_{key}") for key in keys if hasattr(self, f"_{half}_{key}")}
        size = len(tokens["input_ids"]) if torch.is_grad_enabled() else BATCH
        parts = zip(*(value.split(size) for value in tokens.values()), strict=True)
        features = torch.cat([_unit(model.get_text_features(**dict(zip(tokens, part, strict=True)))) for part in parts])
        return F.normalize(features.unflatten(0, (-1, len(self.config.template))).mean(dim=1), dim=-1)

    # --- evaluation -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, accelerator: Accelerator, *, limit: int | None = None) -> Evaluation:
        """Accuracy on the test images of each half among its own classes, and the harmonic mean of the two."""
        self.eval()
        evaluation = Evaluation(metrics={})
        if limit == 0:
            return evaluation
        offset = len(self._train)
        for half in HALVES:
            images, labels = self._tested[half]
            chosen = _spread(len(images), limit)
            found = self._predict(accelerator, half, chosen, offset)
            right = sum(found[index] == labels[index] for index in chosen)
            evaluation.metrics[f"{half}_accuracy"] = right / len(chosen)
            evaluation.counts[f"{half}_answered"] = len(chosen)
            names = self.classes[half]
            for index in (chosen[i] for i in _spread(len(chosen), 4)):
                told = {"expected": _spoken(names[labels[index]]), "output": _spoken(names[found[index]])}
                image = {"prompt": _describe(images, index, half), "image": thumbnail(images[index])}
                evaluation.samples.append({**image, **told})
            offset += len(images)
        metrics = evaluation.metrics
        metrics["harmonic_mean"] = harmonic_mean(metrics["base_accuracy"], metrics["novel_accuracy"])
        return evaluation

    def _predict(self, accelerator: Accelerator, half: Half, chosen: Sequence[int], offset: int) -> dict[int, int]:
        """{test image of one half: number of its class among that half's}."""

        def predict(places: Sequence[int]) -> list[int]:
            batch = self._batch(*self._tested[half], [chosen[place] for place in places], offset)
            batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
            return self.logits(batch, half).argmax(dim=-1).tolist()

        return dict(zip(chosen, map_over_ranks(accelerator, len(chosen), predict, batch_size=BATCH), strict=True))

    @classmethod
    def over_datasets(cls, results: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """Base, novel and harmonic mean of each data set and on average; accuracies are averaged over seeds first."""
        table = summarise({"data": data, **metrics} for data, metrics in results.items())
        return {
            f"{metric.replace('_', ' ')}{f' of {data}' if data else ''}": figure
            for data, figures in table.items()
            if data != "average" or len(results) > 1
            for metric, figure in figures.items()
        }

    @classmethod
    def paper_figure(cls, method: str, dataset: str, metric: str) -> float | None:
        names = ("base_accuracy", "novel_accuracy", "harmonic_mean")
        known = {name.lower(): figures for name, figures in paper_results()["zero-init"].items()}
        if method != "zero-init" or metric not in names or dataset.lower() not in known:
            return None
        return known[dataset.lower()][names.index(metric)] / 100

    def data_report(self) -> dict[str, Any]:
        """Counts of images read, dropped, drawn, skipped and tested on."""
        return dict(self._counts)

    def fingerprint(self) -> str:
        """Over all pixels, labels and prompts."""
        digest = hashlib.sha256(repr((self.labels, self.config.template)).encode())
        for images, labels in ((self._train, self._train_labels), *self._tested.values()):
            digest.update(repr(labels).encode())
            for image in images:
                digest.update(image.numpy().tobytes())
        return digest.hexdigest()


def _spoken(name: str) -> str:
    return name.replace("_", " ").strip()


def _unit(output: Any) -> Tensor:
    """Features as float32 vectors of length one; transformers returned plain tensors before it returned outputs."""
    return F.normalize(getattr(output, "pooler_output", output).float(), dim=-1)


def _spread(count: int, limit: int | None) -> list[int]:
    """At most ``limit`` positions, evenly spread, so that no class is left out because it comes late."""
    if limit is None or limit >= count:
        return list(range(count))
    return [i * count // max(1, limit) for i in range(limit)]


def _describe(images: Images, index: int, half: str) -> str:
    source = images.sources[images.kept[index]]
    if isinstance(source, Path):
        return f"{source.parent.name}/{source.name}"
    return f"{half} image {index + 1}"
