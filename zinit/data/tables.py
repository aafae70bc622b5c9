"""Images that a table of records holds itself: a Parquet file, a data set on the Hub."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from zinit.data.images import Encoded


def with_encoded_images(records: Iterable[Any]) -> Iterable[Any]:
    """The records of a table, their images as the bytes of files; other records as they are."""
    table: Any = records
    features = getattr(records, "features", None)
    if not features:
        return records
    from datasets import Image, List

    stored = Image(decode=False)
    for name, kind in features.items():
        if isinstance(kind, Image):
            table = table.cast_column(name, stored)
        elif isinstance(kind, List) and isinstance(kind.feature, Image):
            table = table.cast_column(name, List(stored))
    return table


def encoded_image(records: Any, index: int, field: str, where: str) -> Encoded | None:
    """An image that a table holds; read again where it is wanted, so that none stays in memory.

    Args:
        records: see `with_encoded_images`.
        index: of the record.
        field: with the image.
        where: for messages.

    Returns:
        None where the field is no image: a path, say, or the table is none.
    """
    if not hasattr(records, "cast_column"):
        return None
    value = records[index][field]
    if not isinstance(value, dict) or not isinstance(value.get("bytes"), bytes):
        return None
    return Encoded(f"{where}, {value.get('path') or 'its image'}", lambda: records[index][field]["bytes"])
