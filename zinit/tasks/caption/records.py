"""Images with captions: COCO's annotations, Karpathy's split of them, JSON lines, and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from zinit.data.images import Encoded, check_image, inside
from zinit.data.records import check_text, describe, each_record, read_document, unused_fields
from zinit.data.tables import encoded_image, with_encoded_images
from zinit.errors import DataError
from zinit.files import is_folder
from zinit.validation import OnBad

VALIDATION = ("val", "validation", "valid", "dev")
PARTS = {"": "", "train": "train", "restval": "train", "test": "test", **dict.fromkeys(VALIDATION, "val")}
COLUMNS = {
    "image": ("image", "img", "file_name", "filename", "filepath", "file", "path"),
    "caption": ("caption", "captions", "text", "raw"),
}
NAMED = 8  # reasons that a report names


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """An image and what people wrote for it.

    Attributes:
        image: its file, or where a table holds it.
        captions: one or more.
        part: "train", "val" or "test"; empty where the data has no parts.
    """

    image: Path | Encoded
    captions: tuple[str, ...]
    part: str = ""

    def each(self) -> list[Captioned]:
        """The image once for each of its captions."""
        return [replace(self, captions=(caption,)) for caption in self.captions]


class _Entry(NamedTuple):
    """An image and captions as a file has them, not yet checked."""

    where: str
    path: Any
    captions: Sequence[Any]
    part: Any = None


@dataclass(kw_only=True)
class CaptionReading:
    """How captions are read, and what of them could not be used.

    Args:
        on_bad: "error" stops at the first entry that cannot be used; "skip" leaves it out and notes why.
        fields: what records call image and caption; None tries the usual names.
        folder: where the images are, seen from the file; an absolute path will do.

    Attributes:
        counts: ``images_read`` and ``captions_read``, and what of them was skipped; the rest is what `read` returns.
        reasons: why entries were skipped, for the first few.
        unused: fields of records that hold something and are not read.
    """

    on_bad: OnBad = "error"
    fields: Sequence[str] | None = None
    folder: str = "."
    counts: Counter[str] = field(default_factory=Counter, init=False)
    reasons: list[str] = field(default_factory=list, init=False)
    unused: Counter[str] = field(default_factory=Counter, init=False)

    def read(self, source: str) -> list[Captioned]:
        """The images of a source, each once, in the order of the source; every file is there and is an image.

        Args:
            source: Karpathy's ``dataset_coco.json``, COCO's ``captions_*.json``, records with an image and a caption
                or several in JSON, JSON lines, CSV or Parquet, a folder with one such file, or a Hub id. Tables may
                hold the images themselves.

        Raises:
            DataError: if it is none of these, or an entry cannot be used and is not to be skipped.
        """
        document, name = read_document(source)
        root = Path(name).parent / self.folder
        grouped: dict[str | Encoded, list[_Entry]] = {}
        for entry in self._entries(document, name):
            if isinstance(entry.path, Encoded):
                grouped[entry.path] = [entry]
            elif isinstance(entry.path, str) and entry.path.strip():
                grouped.setdefault(entry.path.strip(), []).append(entry)
            else:
                self._skip(entry, f"{entry.where}: the image must be a path; got {describe(entry.path)}.")
        if any(isinstance(place, str) for place in grouped) and not is_folder(root):
            raise DataError(
                f"there is no folder {root} of images. Name it, seen from {Path(name).name}: -o task.folder=NAME"
            )
        found = [self._image(root, place, entries) for place, entries in grouped.items()]
        if not any(found):
            raise DataError(f"{name} holds no caption that can be used: {dict(self.counts)}.")
        return [image for image in found if image is not None]

    def _entries(self, document: Any, name: str) -> Iterator[_Entry]:
        if isinstance(document, dict) and isinstance(document.get("images"), list):
            own = _coco(document, name) if "annotations" in document else _karpathy(document, name)
        elif isinstance(document, dict | str) or not isinstance(document, Iterable):
            raise DataError(
                f'{name}: expected {{"images": [...], "annotations": [...]}} as COCO has it, "images" with "sentences" '
                f"as in Karpathy's split, or records with an image and a caption; got {describe(document)}."
            )
        else:
            own = self._rows(document, name)
        for entry in own:
            self.counts["captions_read"] += len(entry.captions)
            yield entry

    def _rows(self, records: Iterable[Any], name: str) -> Iterator[_Entry]:
        """Records with an image and a caption, or a list of captions."""
        columns = COLUMNS.values() if self.fields is None else [(field,) for field in self.fields]
        records = with_encoded_images(records)
        for number, record in enumerate(each_record(records, name), start=1):
            where = f"{name}, record {number}"
            if not isinstance(record, dict):
                raise DataError(f"{where}: expected an object with an image and a caption; got {describe(record)}.")
            picked = []
            for names in columns:
                if (column := next((key for key in names if key in record), None)) is None:
                    raise DataError(
                        f"{where} has no field {' or '.join(names)}; it has {', '.join(map(str, record)) or 'none'}. "
                        f"Name image and caption: -o task.fields=IMAGE,CAPTION"
                    )
                picked.append(column)
            image, caption = picked
            own = record[caption]
            self.unused.update(unused_fields(record, (image, caption, "split")))
            place = encoded_image(records, number - 1, image, where) or record[image]
            yield _Entry(where, place, own if isinstance(own, list) else [own], record.get("split"))

    def _image(self, root: Path, place: str | Encoded, entries: Sequence[_Entry]) -> Captioned | None:
        """An image with the captions of all its entries; None if it is skipped."""
        where = entries[0].where
        captions = [text for entry in entries for text in self._captions(entry)]
        parts = {PARTS.get(str(entry.part).lower() if entry.part else "") for entry in entries}
        try:
            if None in parts or len(parts) > 1:
                given = sorted({str(entry.part or "none") for entry in entries})
                raise DataError(f"its part is {', '.join(given)}; expected one of {', '.join(filter(None, PARTS))}.")
            image = place if isinstance(place, Encoded) else inside(root, place)
            check_image(image)
            if not captions:
                raise DataError(f"{place} has no caption.")
        except DataError as error:
            self._skip(_Entry(where, place, captions), f"{where}: {error}")
            return None
        self.counts["images_read"] += 1
        return Captioned(image=image, captions=tuple(captions), part=parts.pop() or "")

    def _captions(self, entry: _Entry) -> Iterator[str]:
        for text in entry.captions:
            try:
                if not isinstance(text, str) or not text.strip():
                    raise DataError(f"{entry.where}: a caption must be text; got {describe(text)}.")
                yield check_text(text.strip(), "caption", entry.where)
            except DataError as error:
                self._bad(str(error))
                self.counts["captions_skipped"] += 1

    def _skip(self, entry: _Entry, message: str) -> None:
        """Leaves out an image with its captions."""
        self._bad(message)
        self.counts.update(images_read=1, images_skipped=1, captions_skipped=len(entry.captions))

    def _bad(self, message: str) -> None:
        if self.on_bad == "error":
            raise DataError(f"{message} To skip and count such entries: -o task.on_bad=skip")
        self.reasons = [*self.reasons, message][:NAMED]


def _karpathy(document: Mapping[str, Any], name: str) -> Iterator[_Entry]:
    """``{"images": [{"filepath": ..., "filename": ..., "split": ..., "sentences": [{"raw": ...}]}]}``."""
    for number, image in enumerate(document["images"], start=1):
        where = f"{name}, image {number}"
        sentences = image.get("sentences") if isinstance(image, dict) else None
        if not isinstance(sentences, list) or not all(isinstance(sentence, dict) for sentence in sentences):
            raise DataError(f"{where}: expected an object with sentences, filename and split; got {describe(image)}.")
        path = image.get("filename")
        if isinstance(path, str) and image.get("filepath"):
            path = f"{image['filepath']}/{path}"
        yield _Entry(where, path, [sentence.get("raw") for sentence in sentences], image.get("split"))


def _coco(document: Mapping[str, Any], name: str) -> Iterator[_Entry]:
    """``{"images": [{"id": ..., "file_name": ...}], "annotations": [{"image_id": ..., "caption": ...}]}``."""
    captions: dict[Any, list[Any]] = {}
    for kind, needed in (("images", ("id", "file_name")), ("annotations", ("image_id", "caption"))):
        entries = document[kind]
        if not isinstance(entries, list):
            raise DataError(f"{name}: {kind!r} must be a list; got {describe(entries)}.")
        for number, entry in enumerate(entries, start=1):
            if not isinstance(entry, dict) or any(key not in entry for key in needed) or not _is_id(entry[needed[0]]):
                raise DataError(
                    f"{name}, {kind}, entry {number}: expected an object with {' and '.join(needed)}; got "
                    f"{describe(entry)}."
                )
            if kind == "annotations":
                captions.setdefault(entry["image_id"], []).append(entry["caption"])
    for image in document["images"]:
        yield _Entry(f"{name}, image {image['id']}", image["file_name"], captions.pop(image["id"], []))
    for number, own in captions.items():
        yield _Entry(f"{name}, image_id {number} of the annotations, which is no image", None, own)


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)
