"""timm's models from names, folders and local files of weights; what does not fit is refused."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from tests.shared import SHARED, needs_data
from tests.tasks.vit import ARCHITECTURE, SHAPE, save_tiny, tiny
from zinit.errors import BackboneError
from zinit.models.timm import load_timm
from zinit.runs.settings import absolute_path


def flax(model: Any) -> dict[str, np.ndarray]:
    """A ViT's weights under the names and in the shapes of the original JAX archives, written out by hand."""
    width, heads = model.embed_dim, model.blocks[0].attn.num_heads
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    arrays = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": np.zeros((width, 21), dtype=np.float32),
        "head/bias": np.zeros(21, dtype=np.float32),
    }
    for layer in range(len(model.blocks)):
        there, here = f"Transformer/encoderblock_{layer}", f"blocks.{layer}"
        for norm, flax_norm in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            arrays[f"{there}/{flax_norm}/scale"] = state[f"{here}.{norm}.weight"]
            arrays[f"{there}/{flax_norm}/bias"] = state[f"{here}.{norm}.bias"]
        attention = f"{there}/MultiHeadDotProductAttention_1"
        for part, rows in zip(("query", "key", "value"), range(0, 3 * width, width), strict=True):
            weight, bias = (state[f"{here}.attn.qkv.{kind}"][rows : rows + width] for kind in ("weight", "bias"))
            arrays[f"{attention}/{part}/kernel"] = weight.T.reshape(width, heads, -1)
            arrays[f"{attention}/{part}/bias"] = bias.reshape(heads, -1)
        arrays[f"{attention}/out/kernel"] = state[f"{here}.attn.proj.weight"].T.reshape(heads, -1, width)
        arrays[f"{attention}/out/bias"] = state[f"{here}.attn.proj.bias"]
        for dense in (0, 1):
            arrays[f"{there}/MlpBlock_3/Dense_{dense}/kernel"] = state[f"{here}.mlp.fc{dense + 1}.weight"].T
            arrays[f"{there}/MlpBlock_3/Dense_{dense}/bias"] = state[f"{here}.mlp.fc{dense + 1}.bias"]
    return arrays


@pytest.fixture
def small_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's smallest ViT takes a second to make and 20 MB to save: the name stands for `tiny`'s shape here."""
    real = timm.create_model

    def create(name: str, **settings: Any) -> nn.Module:
        return real(name, **(SHAPE if name == ARCHITECTURE else {}), **settings)

    monkeypatch.setattr(timm, "create_model", create)


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth", ".bin"])
def test_local_weights_are_the_models(tmp_path: Path, small_architecture: None, suffix: str) -> None:
    source = tiny()
    file, state = tmp_path / f"weights{suffix}", source.state_dict()
    head = {"head.weight": torch.ones(9, 32), "head.bias": torch.ones(9)}
    if suffix == ".npz":
        np.savez(file, **flax(source))
    elif suffix == ".safetensors":
        save_file(state | head, file)
    else:
        torch.save({"model": state | head} if suffix == ".pth" else state, file)
    model, processor = load_timm(f"{ARCHITECTURE}:{file}", dtype=torch.float32)
    # Where the classifier is left out, timm keeps the backbone as it is.
    torch.testing.assert_close(model(IMAGES), source(IMAGES), atol=1e-6, rtol=1e-6)
    assert {"mean", "std", "interpolation", "input_size"} <= processor.keys()
    assert not model.training


def test_a_folder_of_timms_and_its_dtype(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    for source in (str(folder), folder, f"local-dir:{folder}"):
        model, processor = load_timm(source, dtype=torch.bfloat16)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        torch.testing.assert_close(model.float()(IMAGES), tiny().bfloat16().float()(IMAGES))
        assert processor["mean"] == (0.5, 0.5, 0.5)
        assert processor["input_size"] == (3, 16, 16)


class Payload:
    """What a pickle could run."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (Path.touch, (Path("ran"),))  # pyright: ignore


def bad_weights(folder: Path) -> dict[str, Path]:
    files = {
        name: folder / name for name in ("deep.npz", "patch.npz", "wide.npz", "object.npz", "jpeg.npz", "alone.pth")
    }
    np.savez(files["deep.npz"], **flax(tiny(depth=4)))
    np.savez(files["patch.npz"], **flax(tiny(patch_size=8)))
    np.savez(files["wide.npz"], **flax(tiny(embed_dim=64)))
    np.savez(files["object.npz"], **flax(tiny()), extra=np.array([Payload()], dtype=object))
    files["jpeg.npz"].write_bytes(b"no archive")
    torch.save({"blocks": Payload()}, files["alone.pth"])
    for name, state in {
        "wide.pth": tiny(embed_dim=64).state_dict(),
        "deep.pth": tiny(depth=4).state_dict(),
        "shallow.pth": tiny(depth=2).state_dict(),
        "patch.pth": tiny(patch_size=8).state_dict(),
        "list.pth": [torch.ones(2)],
    }.items():
        torch.save(state, folder / name)
        files[name] = folder / name
    files["pickle.bin"] = folder / "pickle.bin"
    files["pickle.bin"].write_bytes(pickle.dumps(Payload()))
    files["cut.safetensors"] = folder / "cut.safetensors"
    save_file(tiny().state_dict(), files["cut.safetensors"])
    files["cut.safetensors"].write_bytes(files["cut.safetensors"].read_bytes()[:5000])
    files["pointer.pth"] = folder / "pointer.pth"
    files["pointer.pth"].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    files["none.pth"] = folder / "none.pth"
    files["weights.h5"] = folder / "weights.h5"
    files["weights.h5"].write_bytes(b"other")
    return files


REFUSED = {
    "deep.npz": "has 4 layers, the model 3",
    "patch.npz": "patches of 8 x 8 pixels, the model 4 x 4",
    "wide.npz": "is 64 wide, the model 32",
    "object.npz": "allow_pickle=False",
    "jpeg.npz": "cannot be read as the weights",
    "alone.pth": "a pickle can run any code",
    "pickle.bin": "cannot be read|a pickle can run any code",
    "wide.pth": r"other shapes of .*\(\d+ in all\)",
    "deep.pth": r"beyond the model, blocks\.3\..* \(12 in all\)",
    "shallow.pth": r"it lacks blocks\.2\..* \(12 in all\)",
    "patch.pth": "patches of 8 x 8 pixels, the model 4 x 4",
    "list.pth": "holds no state dict",
    "cut.safetensors": "cannot be read as the weights",
    "pointer.pth": "git lfs pull",
    "none.pth": "there is no file of weights",
    "weights.h5": r"expected a file \.safetensors",
}


def test_wrong_weights_are_refused(tmp_path: Path, small_architecture: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = bad_weights(tmp_path)
    assert files.keys() == REFUSED.keys()
    for name, expected in REFUSED.items():
        with pytest.raises(BackboneError, match=expected) as caught:
            load_timm(f"{ARCHITECTURE}:{files[name]}", dtype=torch.float32)
        assert name in str(caught.value)
    assert not (tmp_path / "ran").exists()


@needs_data
def test_a_real_pointer_is_refused() -> None:
    file = SHARED / "data" / "messy" / "lfs_pointer_vit_cifar10.pth"
    with pytest.raises(BackboneError, match="git lfs pull"):
        load_timm(f"{ARCHITECTURE}:{file}", dtype=torch.float32)


def test_models_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for source, expected in {
        "vit_bose_patch16_224": "Near it: vit_base_patch16_224",
        f"vit_bose:{tmp_path / 'x.pth'}": "timm has no model 'vit_bose'",
        str(tmp_path / "x.pth"): "say of which model",
        str(tmp_path / "empty"): r"no config\.json",
        str(tmp_path / "nowhere"): "there is no model folder",
        f"local-dir:{tmp_path / 'nowhere'}": "there is no model folder",
        "vit_tiny_patch16_224": "cannot be loaded as a model of timm's",  # the Hub, offline
        "timm/vit_tiny_patch16_224.augreg_in21k": "cannot be loaded as a model of timm's",
    }.items():
        with pytest.raises(BackboneError, match=expected):
            load_timm(source, dtype=torch.float32)
    shutil.copy(save_tiny(tmp_path / "model") / "config.json", tmp_path / "empty")
    with pytest.raises(BackboneError, match="holds no weights"):
        load_timm(tmp_path / "empty", dtype=torch.float32)


def test_a_model_with_a_file_can_be_used_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.npz").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert absolute_path("vit_base_patch16_224:x.npz") == f"vit_base_patch16_224:{tmp_path / 'x.npz'}"
    assert absolute_path("vit_base_patch16_224:y.npz") == "vit_base_patch16_224:y.npz"


def test_inspecting_reads_no_weights(tmp_path: Path) -> None:
    from zinit.errors import BackboneError
    from zinit.ui.inspection import inspect_model

    folder = save_tiny(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    found = inspect_model(str(folder), options=["length=5"])
    assert (found["backbone"], len(found["sites"])) == ("vit", SHAPE["depth"])
    assert found["num_trainable"] == SHAPE["depth"] * (5 * SHAPE["embed_dim"] + SHAPE["num_heads"])
    assert found["num_parameters"] == sum(parameter.numel() for parameter in tiny().parameters())
    assert inspect_model("vit_base_patch16_224")["num_trainable"] == 12 * (10 * 768 + 12)
    with pytest.raises(BackboneError, match="there is no folder of that name"):
        inspect_model("no-such-model")
