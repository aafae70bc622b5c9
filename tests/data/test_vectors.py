"""Files of ready features of one sample: what they may hold, and what is said of all else."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from zinit.data.vectors import read_vector
from zinit.errors import DataError


def test_vectors_of_every_size(tmp_path: Path) -> None:
    numbers = np.arange(6).reshape(2, 3) / 8
    for name in ("float16", "float32", "float64"):
        np.save(tmp_path / "x.npy", numbers.astype(name))
        found = read_vector(tmp_path / "x.npy")
        assert (found.dtype, found.tolist()) == (np.float32, numbers.tolist())
        save_file({"x": torch.from_numpy(numbers[0].astype(name))}, tmp_path / "x.safetensors")
        assert read_vector(str(tmp_path / "x.safetensors")).tolist() == [numbers[0].tolist()]
    save_file({"x": torch.from_numpy(numbers).bfloat16()}, tmp_path / "x.safetensors")
    assert read_vector(tmp_path / "x.safetensors").tolist() == numbers.tolist()


def test_what_is_no_vector_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "whole.npy", np.arange(3))
    np.save(tmp_path / "deep.npy", np.zeros((1, 2, 3)))
    np.save(tmp_path / "empty.npy", np.zeros((0, 3)))
    np.save(tmp_path / "infinite.npy", np.array([1.0, np.inf]))
    np.save(tmp_path / "large.npy", np.array([1.0, 1e300]))
    np.save(tmp_path / "objects.npy", np.array([{}, 1]), allow_pickle=True)
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(np.ones(3)))
    with (tmp_path / "zip.npy").open("wb") as file:
        np.savez(file, x=np.zeros(3))
    header = np.lib.format.header_data_from_array_1_0(np.zeros((1, 3)))
    with (tmp_path / "cut.npy").open("wb") as file:  # says more than it holds
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (10**9, 10**6)})
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "two.safetensors")
    save_file({"a": torch.zeros(2, dtype=torch.int64)}, tmp_path / "whole.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"\xff" * 20)
    (tmp_path / "pointer.npy").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "x.txt").write_text("1 2")
    for name, message in (
        ("whole.npy", r"expected a vector \(width,\) or several \(number, width\) .*; got int64 \(3,\)"),
        ("deep.npy", r"got float64 \(1, 2, 3\)"),
        ("empty.npy", r"got float64 \(0, 3\)"),
        ("infinite.npy", "not finite in float32"),
        ("large.npy", "not finite in float32"),
        ("objects.npy", "no array of numpy that can be read"),
        ("pickle.npy", "no array of numpy that can be read"),
        ("zip.npy", "no array of numpy that can be read"),
        ("cut.npy", "no array of numpy that can be read"),
        ("two.safetensors", "holds 2 tensors, and one is expected: a, b"),
        ("whole.safetensors", r"got I64 \(2,\)"),
        ("damaged.safetensors", "is damaged"),
        ("pointer.npy", "git lfs pull"),
        ("x.txt", "expected a file of vectors"),
        ("gone.npy", "there is no file of vectors"),
    ):
        with pytest.raises(DataError, match=message):
            read_vector(tmp_path / name)
    with pytest.raises(DataError, match="expected a file of vectors"):
        read_vector([1.0, 2.0])
