"""Pictures: every kind becomes RGB, every bad one is named or counted."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from zinit.data import images
from zinit.errors import DataError


def save(path: Path, mode: str = "RGB", size: tuple[int, int] = (8, 6)) -> Path:
    shape = (size[1], size[0]) if mode in ("L", "1") else (size[1], size[0], len(mode))
    array = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    Image.fromarray(array, mode if mode != "1" else "L").save(path)
    return path


def half(image: Image.Image) -> Image.Image:
    return image.resize((4, 4))


def test_pixels_are_those_of_the_file(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png")
    array = np.asarray(Image.open(path))
    found = images.Images([path], lambda image: image)[0]
    assert found.dtype == torch.uint8
    assert found.shape == (3, 6, 8)
    assert np.array_equal(found.numpy().transpose(1, 2, 0), array)


def test_every_kind_of_image_becomes_rgb(tmp_path: Path) -> None:
    grey = images.read_image(save(tmp_path / "grey.png", "L"))
    clear = Image.new("RGBA", (3, 3), (255, 0, 0, 0))
    deep = Image.fromarray(np.full((2, 2), 65535, dtype=np.uint16))
    assert grey.mode == "RGB"
    assert images.read_image(clear).getpixel((0, 0)) == (255, 255, 255)  # nothing of a red that nobody sees
    assert images.read_image(deep).getpixel((0, 0)) == (255, 255, 255)  # scaled, not clipped or wrapped
    half_deep = Image.fromarray(np.full((2, 2), 32768, dtype=np.uint16))
    assert images.read_image(half_deep).getpixel((0, 0)) == (128, 128, 128)


def bad_images(folder: Path) -> dict[str, Path]:
    whole = save(folder / "whole.jpg", size=(64, 64)).read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("not an image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "pointer.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    Image.new("1", (12_000, 12_000)).save(folder / "large.png")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    Image.new("1", (1, 50_000)).save(folder / "strip.png")
    Image.new("1", (153, 3)).save(folder / "flat.png")
    return {
        "truncated": folder / "truncated.jpg",
        "no image": folder / "text.png",
        "no image that can be read": folder / "empty.png",
        "git lfs pull": folder / "pointer.png",
        "12000 x 12000 pixels": folder / "large.png",
        "too many pixels": folder / "bomb.png",
        "1 x 50000 pixels: one side is more than 50 times as long": folder / "strip.png",
        "153 x 3 pixels": folder / "flat.png",
        "there is no image": folder / "missing.png",
    }


def test_a_bad_image_is_named(tmp_path: Path) -> None:
    for expected, path in bad_images(tmp_path).items():
        with pytest.raises(DataError) as caught:
            images.read_image(path)
        assert expected in str(caught.value)
        assert str(path) in str(caught.value)


def test_a_narrow_image_is_taken_up_to_a_limit(tmp_path: Path) -> None:
    Image.new("RGB", (100, 2)).save(tmp_path / "narrow.png")
    assert images.read_image(tmp_path / "narrow.png").size == (100, 2)
    images.check_image(tmp_path / "narrow.png")


@pytest.mark.parametrize("format", images.FORMATS)
def test_an_image_that_is_cut_off_is_found_without_decoding_whole_ones(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is cut: what is said to be an image can be decoded."""
    made, path = io.BytesIO(), tmp_path / "image"
    pixels = np.random.default_rng(0).integers(0, 255, (12, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(made, format)
    for size in (*range(0, len(made.getvalue()), 7), len(made.getvalue())):
        path.write_bytes(made.getvalue()[:size])
        for source in (path, images.Encoded("here", path.read_bytes)):
            try:
                images.check_image(source)
            except DataError:
                assert size < len(made.getvalue())
            else:
                images.read_image(source)
    if format in ("JPEG", "PNG"):
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it is decoded"))
        for behind in (b"", b"\0" * 20):
            path.write_bytes(made.getvalue() + behind)
            images.check_image(path)
            images.check_image(images.Encoded("here", path.read_bytes))


def test_bad_images_are_counted_when_skipped(tmp_path: Path) -> None:
    bad = list(bad_images(tmp_path).values())
    good = save(tmp_path / "good.png")
    found = images.Images([bad[0], good, *bad[1:], good], half, on_bad="skip")
    assert found.kept == [1, len(bad) + 1]
    assert len(found) + len(found.skipped) == len(bad) + 2
    assert set(found.skipped) == {0, *range(2, len(bad) + 1)}
    with pytest.raises(DataError, match=r"truncated\.jpg"):
        images.Images([good, bad[0]], half)


def test_images_beyond_the_memory_limit_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [save(tmp_path / f"{i}.png", size=(4 + i, 4)) for i in range(3)]
    whole = list(images.Images(paths, half))
    monkeypatch.setattr(images, "KEPT_BYTES", 50)  # one of 48 bytes
    lean = images.Images(paths, half)
    assert len(lean._decoded) == 1
    assert all(torch.equal(a, b) for a, b in zip(whole, lean, strict=True))


def test_class_folders(tmp_path: Path) -> None:
    for name in ("b", "a", ".hidden"):
        (tmp_path / name).mkdir()
        save(tmp_path / name / "1.PNG")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    names, found = images.class_folders(tmp_path)
    assert names == ["a", "b"]
    assert found == [(tmp_path / "a" / "1.PNG", 0), (tmp_path / "b" / "1.PNG", 1)]
    (tmp_path / "c").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        images.class_folders(tmp_path)
    with pytest.raises(DataError, match="at least two sub-folders"):
        images.class_folders(tmp_path / "a")


def test_paths_in_lists_stay_inside(tmp_path: Path) -> None:
    assert images.inside(tmp_path, "images/0.png") == tmp_path / "images" / "0.png"
    for path in ("../x.png", "/etc/passwd", "a/../../x.png"):
        with pytest.raises(DataError, match="leaves the folder"):
            images.inside(tmp_path, path)


def test_normalise_matches_the_formula() -> None:
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    found = images.normalise(pixels, (0.5, 0.25, 0.1), (0.5, 0.2, 0.3)).flatten().tolist()
    assert found == pytest.approx([-1.0, (128 / 255 - 0.25) / 0.2, 0.9 / 0.3], abs=1e-6)


def test_images_beyond_the_limit_are_the_right_ones_after_bad_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions among what is here are not positions in the list; sizes differ, so that a small one still fits."""
    (tmp_path / "bad.png").write_bytes(b"no image")
    paths = [save(tmp_path / f"{i}.png", size=size) for i, size in enumerate([(4, 4), (9, 9), (4, 3), (3, 4)])]
    monkeypatch.setattr(images, "KEPT_BYTES", 100)  # the first takes 48, the second does not fit, the third would
    lean = images.Images([tmp_path / "bad.png", *paths], lambda image: image, on_bad="skip")
    assert [tuple(image.shape[1:]) for image in lean] == [(4, 4), (9, 9), (3, 4), (4, 3)]
    assert [image.numpy().tobytes() for image in lean] == [
        np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes() for path in paths
    ]


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"])
def test_no_program_runs_for_an_image(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow reads EPS with Ghostscript, whatever the file is called."""

    def run(*arguments: object, **options: object) -> None:
        raise AssertionError(f"a program was started: {arguments}")

    monkeypatch.setattr("subprocess.Popen", run)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jpg is no image that can be read: it is none in JPEG, PNG, .* or PPM"):
        images.read_image(tmp_path / "a.jpg")
    for format in ("ICO", "PCX", "PDF"):
        Image.new("RGB", (8, 8)).save(tmp_path / "b.png", format)
        with pytest.raises(DataError, match="is no image that can be read"):
            images.read_image(tmp_path / "b.png")


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png is no regular file"):
        images.read_image(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="is no regular file"):
        images.read_image(tmp_path / "b.png")
