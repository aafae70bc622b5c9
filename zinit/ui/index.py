"""The commands ``zinit index build`` and ``zinit index info``. Heavy modules are imported inside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from zinit.errors import ConfigError, DataError
from zinit.ui.options import Json

ROWS = 4096  # of features at once
IMAGES = 32


def build(
    index: Annotated[str, typer.Argument(metavar="INDEX", help="A new folder.")],
    data: Annotated[
        str, typer.Option(help="Features (.npy, .safetensors, faiss's .index), or a folder of images with --encoder.")
    ],
    encoder: Annotated[str | None, typer.Option(help="Makes the features of images: folder, name or Hub id.")] = None,
    normalise: Annotated[bool, typer.Option(help="Bring each feature to the length 1.")] = True,
    as_json: Json = False,
) -> None:
    """An index of features, for cache retrieval (ImageBind-LLM): see docs/senses.md."""
    from zinit.encoders.retrieval import FeatureIndex
    from zinit.encoders.vectors import is_vectors, read_vectors

    if is_vectors(data):
        if encoder is not None:
            raise ConfigError(f"{data} holds features already. Leave --encoder out.")
        vectors = read_vectors(data)
        blocks: Any = (vectors[start : start + ROWS] for start in range(0, len(vectors), ROWS))
        FeatureIndex.build(index, blocks, count=len(vectors), width=vectors.shape[1], normalised=normalise)
    else:
        _of_images(index, data, encoder, normalise)
    info(index, as_json=as_json)


def info(
    index: Annotated[str, typer.Argument(metavar="INDEX", help="A folder of 'zinit index build'.")],
    as_json: Json = False,
) -> None:
    """What an index holds."""
    from zinit.encoders.retrieval import describe_index
    from zinit.ui.console import print_json, print_table

    found = describe_index(index)
    if as_json:
        print_json({"index": index, **found})
        return
    found["encoder"] = (found["encoder"] or {}).get("source", "features from a file")
    print_table(index, ["", ""], [[name, str(value)] for name, value in found.items()])


def _of_images(index: str, data: str, source: str | None, normalise: bool) -> None:
    from collections import Counter

    from zinit.adapter.encoding import encode, load_feature_encoder
    from zinit.data.images import image_files
    from zinit.encoders.retrieval import FeatureIndex
    from zinit.files import is_folder, local_path
    from zinit.ui.console import say

    if source is None:
        raise ConfigError("name what makes the features of images: --encoder FOLDER_OR_HUB_ID")
    folder, left_out = local_path(data), Counter[str]()
    if not is_folder(folder):
        raise DataError(f"there is no folder {folder} of images, and no file of features of that name.")
    images = image_files(folder, left_out)
    if not images:
        raise DataError(f"{folder} holds no image: {dict(left_out)}.")
    encoder = load_feature_encoder(source)

    def blocks() -> Iterator[Any]:
        for start in range(0, len(images), IMAGES):
            pooled = encode(encoder, images[start : start + IMAGES]).pooled
            assert pooled is not None
            yield pooled.cpu().numpy()

    first = encode(encoder, images[:1]).pooled
    assert first is not None
    FeatureIndex.build(
        index, blocks(), count=len(images), width=first.shape[1], normalised=normalise, encoder=encoder.identity
    )
    if counted := {name: count for name, count in left_out.items() if count}:
        say(f"left out: {', '.join(f'{count} {name}' for name, count in counted.items())}", error=True)
