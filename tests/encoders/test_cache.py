"""Features of images on disk: made once, the encoder's own bit for bit, found again by whoever needs them."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor

from tests.encoders.test_encoders import image, tower
from zinit.adapter.encoding import Encoder, Features, encode, load_feature_encoder
from zinit.adapter.visual import ProjectedImage, VisualTokens
from zinit.data.images import content_digest
from zinit.encoders.cache import FeatureCache, cache_root
from zinit.errors import ConfigError, DataError


class Counting(Encoder):
    """Another encoder, whose passes are counted."""

    def __init__(self, inner: Encoder, processing: str = "plain") -> None:
        super().__init__()
        self.inner, self.seen, self.processing = inner, 0, processing
        self.width, self.layer_width, self.depth, self.identity = 16, 16, inner.depth, inner.identity

    def prepare(self, items: Any) -> Tensor:
        return self.inner.prepare(items)

    def forward(self, pixels: Tensor, layers: int = 0) -> Features:
        self.seen += len(pixels)
        return self.inner(pixels, layers)

    def difference(self, identity: Any) -> str | None:
        return self.inner.difference(identity)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_feature_encoder(tower("timm"))


def sources() -> dict[str, Any]:
    return {
        "projected-image": ProjectedImage(width=8, length=2, feature_width=32, layers=2),
        "visual-tokens": VisualTokens(width=8, length=2, feature_width=16, hidden=8, blocks=1, heads=2),
    }


def some(count: int, start: int = 0) -> dict[bytes, Image.Image]:
    found = [image(seed) for seed in range(start, start + count)]
    return {content_digest(one): one for one in found}


def cache(encoder: Encoder, root: Path, kind: str = "projected-image", limit: float = 1.0) -> FeatureCache:
    return FeatureCache(encoder, sources()[kind], root=root, limit=limit)


@pytest.mark.parametrize("kind", sorted(sources()))
def test_they_are_the_encoders_own(kind: str, encoder: Encoder, tmp_path: Path) -> None:
    """Also for samples with several images, and with none."""
    made, images = cache(encoder, tmp_path, kind), some(5)
    made.fill(images)
    digests, pictures = list(images), list(images.values())
    samples = [digests[:1], [], digests[1:3], digests[3:]]
    given = [pictures[0], None, pictures[1:3], pictures[3:]]
    layers = sources()[kind].layers
    expected, found = encode(encoder, given, layers=layers), made.features(samples)
    source = sources()[kind]
    with torch.no_grad():
        theirs, ours = source(expected), source(found)
    assert torch.allclose(ours.tokens, theirs.tokens, atol=1e-6, rtol=0)
    assert ours.present is not None
    assert ours.present.tolist() == [True, False, True, True]
    assert (found.tokens is None) == (kind == "projected-image")
    assert len(found.layers) == layers


def test_an_image_is_encoded_once(encoder: Encoder, tmp_path: Path) -> None:
    counting = Counting(encoder)
    cache(counting, tmp_path).fill(some(5))
    asked = counting.seen
    assert 5 <= asked <= 6  # the first also tells the size
    again = cache(counting, tmp_path)
    again.fill(some(5))
    assert counting.seen == asked
    again.fill(some(7))
    assert counting.seen == asked + 2 + 1
    other = cache(Counting(encoder, "another size"), tmp_path)
    assert len(other.missing(some(5))) == 5  # other pixels, other features


def test_processes_divide_the_images(encoder: Encoder, tmp_path: Path) -> None:
    images = some(7)
    ranks = [cache(Counting(encoder), tmp_path) for _ in range(3)]
    for rank, own in enumerate(ranks):
        own._find = lambda: None  # pyright: ignore  # none sees what the others write meanwhile
        own.fill(images, rank=rank, world=3)
    assert [own.encoder.seen - 1 for own in ranks] == [3, 2, 2]  # pyright: ignore
    found = cache(Counting(encoder), tmp_path)
    assert not found.missing(images)


def test_a_batch_without_any_image_has_features_that_are_absent(encoder: Encoder, tmp_path: Path) -> None:
    made = cache(encoder, tmp_path, "visual-tokens")
    made.fill(some(2))
    found = made.features([[], []])
    assert found.present is not None
    assert not found.present.any()
    with torch.no_grad():
        context = sources()["visual-tokens"](found)
    assert context.tokens.isfinite().all()
    assert not context.for_present(context.tokens).any()


def test_more_than_the_limit_is_refused_before_anything_is_made(encoder: Encoder, tmp_path: Path) -> None:
    counting, told = Counting(encoder), []
    with pytest.raises(ConfigError, match=r"features of 5 images take .* more than encoder\.cache_limit=1e-07"):
        cache(counting, tmp_path, limit=1e-7).fill(some(5))
    assert counting.seen == 1
    assert not list(tmp_path.iterdir())
    cache(counting, tmp_path).fill(some(5), tell=told.append)
    assert told == [f"features of 5 images take 6.4e-07 GB (layers (2, 16)); 5 of them are encoded now, into "
                    f"{next(tmp_path.iterdir())}"]  # fmt: skip


def test_a_folder_that_cannot_be_written_is_noticed_before_the_encoder_runs(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting(encoder)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written to .*file.*another folder: -o encoder\.cache=FOLDER"):
        cache(counting, tmp_path / "file").fill(some(5))

    def full(**options: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr("tempfile.TemporaryFile", full)
        with pytest.raises(ConfigError, match=r"cannot be written to .*: Read-only file system"):
            cache(counting, tmp_path / "cache").fill(some(5))
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=600))
        with pytest.raises(ConfigError, match=r"5 images take 6.4e-07 GB .* has room for 6e-07 GB\. Make room"):
            cache(counting, tmp_path / "cache").fill(some(5))
    assert counting.seen == 3, "one each, for the size"
    cache(counting, tmp_path / "cache").fill(some(5))


def test_files_that_are_not_what_they_say_are_made_again(encoder: Encoder, tmp_path: Path) -> None:
    """Cut at any byte, or with other tensors than the images they name."""
    cache(encoder, tmp_path).fill(some(3))
    (path,) = tmp_path.glob("*/*.safetensors")
    data, whole = path.read_bytes(), load(path.read_bytes())
    for size in range(0, len(data), 16):
        path.write_bytes(data[:size])
        assert len(cache(encoder, tmp_path).missing(some(3))) == 3, size
    digests, layers = whole["digests"], whole["layers"]
    for wrong in (
        {"digests": digests, "layers": layers[:2]},
        {"digests": digests[:, :31].contiguous(), "layers": layers},
        {"digests": digests.float(), "layers": layers},
        {"digests": digests},
        {"digests": digests, "layers": torch.tensor(1.0)},
    ):
        path.write_bytes(save(wrong))
        assert len(cache(encoder, tmp_path).missing(some(3))) == 3
    path.write_bytes(data)
    made = cache(encoder, tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"\.safetensors cannot be read.* Run the same command again"):
        made.features([list(some(1))])


def test_a_damaged_file_is_made_again(encoder: Encoder, tmp_path: Path) -> None:
    cache(encoder, tmp_path).fill(some(3))
    (path,) = tmp_path.glob("*/*.safetensors")
    path.write_bytes(path.read_bytes()[:40])
    made = cache(encoder, tmp_path)
    assert len(made.missing(some(3))) == 3
    made.fill(some(3))
    assert not cache(encoder, tmp_path).missing(some(3))


def test_an_image_that_cannot_be_decoded_is_named(encoder: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    image(0).save(path)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"cut\.png is damaged"):
        cache(encoder, tmp_path / "features").fill({content_digest(path): path})


def test_what_has_not_been_encoded_is_not_made_up(encoder: Encoder, tmp_path: Path) -> None:
    made = cache(encoder, tmp_path)
    made.fill(some(1))
    with pytest.raises(ConfigError, match="2 images have no features"):
        made.features([list(some(3))])


def test_where_they_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "zinit" / "features"
    assert cache_root(str(tmp_path / "own")) == tmp_path / "own"
    with pytest.raises(DataError, match=r"no\.png"):
        content_digest(tmp_path / "no.png")
