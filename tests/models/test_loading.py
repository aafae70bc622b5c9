"""Loading a host: sharded files give the same weights, and they go where they are asked to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.contract.cases import clip
from tests.tasks.encoder import encoder_tokenizer, save_tiny_encoder, tiny_encoder
from tests.tasks.vit import save_tiny
from tests.tiny import byte_tokenizer, save_tiny_llama
from zinit.errors import BackboneError
from zinit.models.loading import load_causal_lm, load_clip, load_encoder
from zinit.models.timm import load_timm
from zinit.runs.build import build_model
from zinit.runs.settings import resolve

META = torch.device("meta")  # any device but the CPU will do


def devices(model: nn.Module) -> set[str]:
    return {parameter.device.type for parameter in model.parameters()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hosts in one file and in several."""
    folder = tmp_path_factory.mktemp("hosts")
    save_tiny_llama(folder / "llama")
    save_tiny_encoder(folder / "encoder")
    encoder_tokenizer().save_pretrained(folder / "encoder-sharded")
    clip().save_pretrained(folder / "clip")  # pyright: ignore[reportCallIssue]
    model: Any = load_causal_lm(folder / "llama", dtype=torch.float32, tokenizer=False)[0]
    models = {"llama": model, "encoder": tiny_encoder(), "clip": clip()}
    for name, model in models.items():
        model.save_pretrained(folder / f"{name}-sharded", max_shard_size="20KB")
        index = json.loads((folder / f"{name}-sharded" / "model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) > 3
    for name in ("llama-sharded", "clip", "clip-sharded"):
        byte_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize(("name", "load"), [("clip", load_clip), ("encoder", load_encoder), ("llama", load_causal_lm)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_shards_give_the_same_weights(name: str, load: Any, dtype: torch.dtype, folder: Path) -> None:
    whole, sharded = (load(folder / f"{name}{kind}", dtype=dtype)[0].state_dict() for kind in ("", "-sharded"))
    assert whole.keys() == sharded.keys()
    assert all(value.dtype == dtype for value in whole.values() if value.is_floating_point())
    assert all(torch.equal(sharded[name], value) for name, value in whole.items())


@pytest.mark.parametrize(("name", "load"), [("clip", load_clip), ("encoder", load_encoder), ("llama", load_causal_lm)])
def test_weights_go_straight_to_the_device(name: str, load: Any, folder: Path) -> None:
    for kind in ("", "-sharded"):
        assert devices(load(folder / f"{name}{kind}", dtype=torch.float32)[0]) == {"cpu"}
        assert devices(load(folder / f"{name}{kind}", dtype=torch.float32, device=META)[0]) == {"meta"}


def test_timm_too(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "vit")
    assert devices(load_timm(source, dtype=torch.float32, device="meta")[0]) == {"meta"}


def test_a_run_loads_to_where_it_says(folder: Path) -> None:
    config, _ = resolve(backbone="llama", model=str(folder / "llama"), data="unused.json", options=["method=head-only"])
    assert devices(build_model(config, META).adapted.model) == {"meta"}
    assert devices(build_model(config, META, load_to="cpu").adapted.model) == {"cpu"}


LOADERS = pytest.mark.parametrize(
    ("name", "load"), [("clip", load_clip), ("encoder", load_encoder), ("llama", load_causal_lm)]
)


@LOADERS
def test_transformers_keeps_quiet_and_speaks_again_afterwards(
    name: str, load: Any, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    capfd.readouterr()
    load(folder / name, dtype=torch.float32)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    list(logging.tqdm([1, 2], desc="another's bar"))
    assert "another's bar" in capfd.readouterr().err


@LOADERS
def test_missing_weights_are_an_error_and_not_a_report(name: str, load: Any, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / name, tmp_path / name)
    file = tmp_path / name / "model.safetensors"
    tensors = load_file(file)
    gone = next(tensor for tensor in tensors if "layernorm" in tensor.lower())
    del tensors[gone]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(BackboneError, match=rf"{tmp_path / name} lacks 1 weights of \w+, such as .*{gone[-20:]}"):
        load(tmp_path / name, dtype=torch.float32)
