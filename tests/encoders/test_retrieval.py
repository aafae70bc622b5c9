"""Cache retrieval: exact search in blocks against faiss and a naive oracle, the mixture, files, the commands."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from torch import Tensor

from tests.cli.conftest import zinit  # noqa: F401  # a fixture
from zinit.demo import vit_path
from zinit.encoders import retrieval
from zinit.encoders.retrieval import FeatureIndex, RetrievalConfig
from zinit.encoders.vectors import read_vectors
from zinit.errors import ConfigError, DataError

COUNT, WIDTH = 600, 1024


def unit(count: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def blocks(vectors: np.ndarray) -> Iterator[np.ndarray]:
    yield from np.array_split(vectors, 3)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> FeatureIndex:
    made = tmp_path_factory.mktemp("index") / "of" / "images"
    return FeatureIndex.build(made, blocks(5 * unit(COUNT, 0)), count=COUNT, width=WIDTH)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "BLOCK_BYTES", 4 * WIDTH * 130)  # five blocks, the last of 80


def oracle(
    keys: np.ndarray, feature: np.ndarray, k: int = 10, sharpness: float = 20, weight: float = 0.5
) -> np.ndarray:
    """One feature, in float64, as the paper and its code write it."""
    scores = keys.astype(np.float64) @ feature.astype(np.float64)
    nearest = sorted(range(len(keys)), key=lambda row: -scores[row])[:k]
    powers = [math.exp(sharpness * scores[row]) for row in nearest]
    mean = sum(power / sum(powers) * keys[row].astype(np.float64) for power, row in zip(powers, nearest, strict=True))
    mixed = (1 - weight) * feature.astype(np.float64) + weight * mean / np.linalg.norm(mean)
    return mixed / np.linalg.norm(mixed)


def test_search_is_that_of_faiss_flat(index: FeatureIndex) -> None:
    faiss = pytest.importorskip("faiss")
    flat = faiss.IndexFlatIP(WIDTH)
    flat.add(np.asarray(index.keys, dtype=np.float32))
    queries = 1.3 * unit(20, 1)
    scores, places = index.search(torch.from_numpy(queries), 10)
    expected_scores, expected_places = flat.search(queries, 10)
    assert torch.allclose(scores, torch.from_numpy(expected_scores), atol=1e-6, rtol=0)
    assert places.tolist() == expected_places.tolist()
    assert {place // 130 for place in places.flatten().tolist()} == set(range(5))


@pytest.mark.parametrize("settings", [{}, {"neighbours": 3, "sharpness": 5.0, "weight": 0.25}, {"weight": 1.0}])
def test_the_mixture_is_the_papers(index: FeatureIndex, settings: dict[str, Any]) -> None:
    features = 0.7 * unit(5, 2)  # a mixture of modalities is not of length 1
    config = RetrievalConfig(**settings)
    found = index.mix(torch.from_numpy(features), config)
    how = (config.neighbours, config.sharpness, config.weight)
    for keys, tolerance in ((index.keys, 1e-6), (unit(COUNT, 0), 5e-5)):  # as rounded; as they were
        expected = torch.from_numpy(np.stack([oracle(keys, feature, *how) for feature in features]))
        assert (found - expected).abs().max() < tolerance
    assert index.mix(torch.from_numpy(features).bfloat16()).dtype == torch.bfloat16
    assert torch.allclose(index.mix(found, RetrievalConfig(weight=0.0)), found, atol=1e-6)


def test_small_indices_and_wrong_settings(tmp_path: Path) -> None:
    few = FeatureIndex.build(tmp_path / "few", blocks(unit(4, 0)), count=4, width=WIDTH)
    scores, places = few.search(torch.from_numpy(unit(4, 0)), 10)
    assert (tuple(scores.shape), places[:, 0].tolist()) == ((4, 4), [0, 1, 2, 3])
    with pytest.raises(ConfigError, match=r"has keys of width 1024; got queries \(4, 23\)"):
        few.mix(torch.ones(4, 23))
    with pytest.raises(ConfigError, match=r"weight must be from 0 to 1; got 1.5"):
        RetrievalConfig(weight=1.5)


def test_files_are_whole_and_checked(index: FeatureIndex, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(ConfigError, match="exists already"):
        FeatureIndex.build(tmp_path / "full", blocks(unit(4, 0)), count=4, width=WIDTH)
    for vectors, message in (
        (np.zeros((4, WIDTH)), "the feature 0 is zero"),
        (unit(4, 0) * np.array([[1], [1], [np.nan], [1]]), "the feature 2 is not finite"),
        (unit(3, 0), "was to get 4 features; got 3"),
    ):
        with pytest.raises(DataError, match=message):
            FeatureIndex.build(tmp_path / "bad", blocks(vectors), count=4, width=WIDTH)
        assert list((tmp_path / "bad").iterdir()) == []  # nothing half made, and the next try goes
    with pytest.raises(DataError, match=r"holds no index .*zinit index build"):
        FeatureIndex.open(tmp_path / "bad")
    made = FeatureIndex.build(tmp_path / "made", blocks(300 * unit(4, 0)), count=4, width=WIDTH, normalised=False)
    assert float(np.linalg.norm(made.keys[0].astype(np.float32))) == pytest.approx(300, rel=1e-3)
    about = json.loads((tmp_path / "made" / "index.json").read_text())
    (tmp_path / "made" / "index.json").write_text(json.dumps(about | {"keys": 5}))
    with pytest.raises(DataError, match=r"holds float16 \(4, 1024\), and index.json says float16 \(5, 1024\)"):
        FeatureIndex.open(tmp_path / "made")
    (tmp_path / "made" / "index.json").write_text(json.dumps(about | {"encoder": "clip"}))
    with pytest.raises(DataError, match=r"index.json names its encoder by 'clip'"):
        FeatureIndex.open(tmp_path / "made")
    (tmp_path / "made" / "index.json").write_text(json.dumps(about))
    with (tmp_path / "made" / "keys.npy").open("wb") as file:
        np.savez(file, x=np.zeros(3))
    with pytest.raises(DataError, match=r"keys.npy is damaged.*Build the index again"):
        FeatureIndex.open(tmp_path / "made")


def test_ready_features_are_read(tmp_path: Path) -> None:
    vectors = unit(4, 0)
    np.save(tmp_path / "x.npy", vectors.astype(np.float16))
    save_file({"one": vectors}, tmp_path / "one.safetensors")
    save_file({"a": vectors, "b": 2 * vectors}, tmp_path / "two.safetensors")
    assert np.array_equal(read_vectors(str(tmp_path / "x.npy")), vectors.astype(np.float16))
    assert np.array_equal(read_vectors(str(tmp_path / "one.safetensors")), vectors)
    assert np.array_equal(read_vectors(f"{tmp_path / 'two.safetensors'}:b"), 2 * vectors)
    np.save(tmp_path / "flat.npy", vectors[0])
    np.save(tmp_path / "whole.npy", np.arange(6).reshape(2, 3))
    np.save(tmp_path / "pickle.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "x.txt").write_text("1 2")
    for name, message in (
        ("flat.npy", r"got float32 \(1024,\)"), ("whole.npy", r"got int64 \(2, 3\)"), ("pickle.npy", "no array"),
        ("x.txt", "expected features"), ("gone.npy", "there is no file"), ("two.safetensors", "Name one:"),
        ("two.safetensors:c", "holds no tensor 'c'"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            read_vectors(str(tmp_path / name))


def test_an_index_of_faiss_is_read(tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    flat = faiss.IndexFlatIP(WIDTH)
    flat.add(unit(9, 3))
    faiss.write_index(flat, str(tmp_path / "knn.index"))
    assert np.array_equal(read_vectors(str(tmp_path / "knn.index")), unit(9, 3))
    (tmp_path / "bad.index").write_bytes(b"nothing")
    with pytest.raises(DataError, match="faiss cannot give the vectors back"):
        read_vectors(str(tmp_path / "bad.index"))


def test_the_commands(zinit: Any, tmp_path: Path) -> None:  # noqa: F811
    np.save(tmp_path / "x.npy", unit(9, 0))
    done = zinit("index", "build", tmp_path / "one", "--data", tmp_path / "x.npy", "--json")
    assert (done.code, json.loads(done.out)["keys"], json.loads(done.out)["width"]) == (0, 9, WIDTH), done.err
    for number in range(3):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), (80 * number, 9, 9)).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    refused = zinit("index", "build", tmp_path / "two", "--data", tmp_path / "images")
    assert (refused.code, "--encoder" in refused.err) == (2, True)
    done = zinit("index", "build", tmp_path / "two", "--data", tmp_path / "images", "--encoder", vit_path())
    assert (done.code, "1 files_skipped_no_image" in done.err) == (0, True), done.err
    told = zinit("index", "info", tmp_path / "two", "--json")
    found: dict[str, Any] = json.loads(told.out)
    assert (found["keys"], found["normalised"], found["encoder"]["source"]) == (3, True, str(vit_path()))
    index = FeatureIndex.open(tmp_path / "two")
    own: Tensor = torch.from_numpy(np.array(index.keys[1:2])).float()
    assert index.search(own, 1)[1].tolist() == [[1]]
    assert zinit("index", "info", tmp_path / "images").code == 2
