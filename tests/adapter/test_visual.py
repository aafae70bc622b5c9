"""Adapters that see images: projected images (V1) and visual tokens (V2), from the encoder to the logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import zinit
from tests.contract.cases import causal_lm, text_batch
from tests.encoders.test_encoders import image, saved, tower
from zinit.adapter.encoding import Features, encode, load_feature_encoder
from zinit.errors import CheckpointError, ConfigError

LATE = zinit.PrefixConfig(length=3, layers=2, gate_init=0.7, prompt="table+context")
EARLY = zinit.PrefixConfig(length=3, layers=(0,), gate_init=0.7, prompt="context")
SOURCES = {
    "projected-image": ({"late": LATE}, {"layers": 2, "hidden": 6}),
    "visual-tokens": ({"early": EARLY, "late": zinit.PrefixConfig(length=4, layers=2, gate_init=0.7)},
                      {"hidden": 8, "blocks": 1, "heads": 2}),
    "bind": ({"late": zinit.PrefixConfig(length=1, gate_init=0.7, prompt="table+context")}, {"hidden": 8, "blocks": 1}),
    "visual-tokens-late": ({"late": LATE}, {"hidden": 8, "blocks": 1, "heads": 2}),
}  # fmt: skip


def config(name: str, **changes: Any) -> zinit.AdapterConfig:
    parts, options = SOURCES[name]
    return zinit.AdapterConfig(parts=parts, context=name.removesuffix("-late"), context_options=options, **changes)


def closed(name: str) -> zinit.AdapterConfig:
    parts = {part: zinit.PrefixConfig(**{**own.to_dict(), "gate_init": 0.0}) for part, own in SOURCES[name][0].items()}
    return zinit.AdapterConfig(**{**vars(config(name)), "parts": parts})


def adapted(name: str, encoder: Any, **changes: Any) -> tuple[Any, zinit.Handle]:
    model = causal_lm("Llama")
    return model, zinit.attach(model, config(name, **changes), encoder=encoder, seed=1)


def logits(model: Any, rows: slice = slice(None)) -> Tensor:
    return model(**{name: tensor[rows] for name, tensor in text_batch("left").items()}).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("encoder"))


IMAGES = [image(1), None, [image(2), image(3)]]


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_closed_gates_are_the_base_bit_for_bit(name: str, dtype: torch.dtype, folder: Path) -> None:
    model = causal_lm("Llama").to(dtype)
    with torch.no_grad():
        base = logits(model)
        handle = zinit.attach(model, zinit.AdapterConfig(**{**vars(closed(name)), "tuning": zinit.TuningConfig()}),
                              encoder=folder)  # fmt: skip
        assert torch.equal(logits(model), base)
        for images in (IMAGES, [image(1), image(2), image(3)]):
            with handle.given(image=images):
                assert torch.equal(logits(model), base)


@pytest.mark.parametrize("name", SOURCES)
def test_each_sample_sees_its_own_images(name: str, folder: Path) -> None:
    """A batch of one image, none and two is its rows alone; a row without an image is what it is without images."""
    model, handle = adapted(name, folder)
    with torch.no_grad():
        without = logits(model)
        with handle.given(image=IMAGES):
            together = logits(model)
        torch.testing.assert_close(together[1], without[1], rtol=1e-5, atol=1e-6)  # other shapes of products
        assert name != "visual-tokens" or torch.equal(together[1], without[1])
        for row in (0, 2):
            with handle.given(image=[IMAGES[row]]):
                alone = logits(model, slice(row, row + 1))
            torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-5)
            assert (together[row] - without[row]).abs().max() > 1e-2


@pytest.mark.parametrize("name", SOURCES)
def test_everything_that_makes_the_context_learns(name: str, folder: Path) -> None:
    model, handle = adapted(name, folder)
    with handle.given(image=IMAGES):
        logits(model).square().mean().backward()
    assert set(handle.roles()) == {"gates", "prompts", "source"}
    for parameter_name, parameter in handle.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name
    assert not any(parameter.grad is not None for parameter in handle.encoder.parameters())  # pyright: ignore


def test_a_projected_image_is_the_bottleneck_of_its_layers(folder: Path) -> None:
    _, handle = adapted("projected-image", folder)
    features = encode(load_feature_encoder(folder), [image(1), None], layers=2)
    own = {name.removeprefix("shared.context."): p for name, p in handle.named_parameters() if "shared" in name}
    joined = torch.cat(features.layers, -1)
    normed = (joined - joined.mean(-1, keepdim=True)) / (joined.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    hidden = F.silu((normed * own["norm.weight"] + own["norm.bias"]) @ own["down.weight"].T + own["down.bias"])
    expected = hidden @ own["up.weight"].T + own["up.bias"]
    context = handle.shared["context"](features)
    torch.testing.assert_close(context.tokens[:, 0], expected)
    assert context.present.tolist() == [True, False]


def test_generation_sees_the_image_at_every_token(folder: Path) -> None:
    model, handle = adapted("visual-tokens", folder)
    ids = text_batch("none")["input_ids"]
    with torch.no_grad(), handle.given(image=IMAGES):
        made = model.generate(ids, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True)
        whole = model(made.sequences).logits[:, ids.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(made.logits, 1), whole, rtol=1e-4, atol=1e-5)


def test_saved_beside_the_language_half_and_loaded_with_its_encoder(tmp_path: Path, folder: Path) -> None:
    from safetensors.torch import load_file

    model, handle = adapted("visual-tokens", folder, tuning=zinit.TuningConfig(norms=False))
    with handle.given(image=IMAGES):
        expected = logits(model)
    handle.save(tmp_path / "adapter")
    assert all(name.startswith("shared.context.") for name in load_file(tmp_path / "adapter" / "source.safetensors"))
    assert not any("shared" in name for name in load_file(tmp_path / "adapter" / "adapter.safetensors"))
    again = zinit.load(causal_lm("Llama"), tmp_path / "adapter")
    assert again.encoder is None  # read when an image is first given
    with again.given(image=IMAGES):
        assert torch.equal(logits(again.model), expected)
    elsewhere = saved(tmp_path / "elsewhere")
    with zinit.load(causal_lm("Llama"), tmp_path / "adapter", encoder=elsewhere).given(image=IMAGES):
        pass
    other = saved(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="trained with another encoder"):
        zinit.load(causal_lm("Llama"), tmp_path / "adapter", encoder=other)


def test_sizes_in_a_file_are_compared_before_anything_is_allocated(tmp_path: Path, folder: Path) -> None:
    _, handle = adapted("visual-tokens", folder)
    handle.save(tmp_path)
    description = json.loads((tmp_path / "adapter.json").read_text())
    description["config"]["context_options"] |= {"hidden": 65_536, "blocks": 64}  # 13 TB
    (tmp_path / "adapter.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=r"shared.context"):
        zinit.load(causal_lm("Llama"), tmp_path)


def test_from_the_hub_come_all_the_files_that_there_are(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, handle = adapted("visual-tokens", folder)
    handle.save(tmp_path / "there")

    def download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        (tmp_path / "here").mkdir()
        for file in (tmp_path / "there").iterdir():
            if file.name in allow_patterns:
                shutil.copy(file, tmp_path / "here")
        return str(tmp_path / "here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    again = zinit.load(causal_lm("Llama"), "me/my-adapter")
    assert all(torch.equal(own, again.state_dict()[name]) for name, own in handle.state_dict().items())


def test_features_may_be_given_instead_of_images(folder: Path) -> None:
    model, handle = adapted("visual-tokens", folder)
    with handle.given(image=IMAGES):
        expected = logits(model)
    features = encode(load_feature_encoder(folder), IMAGES)
    with handle.given(features=features):
        assert torch.equal(logits(model), expected)
    mute = Features(features.tokens, features.pooled, (), features.mask, torch.zeros(3, dtype=torch.bool))
    with handle.given(features=mute):
        assert torch.equal(logits(model), logits(causal_lm_with(handle)))


def causal_lm_with(handle: zinit.Handle) -> Any:
    """The same adapter on another model, given nothing."""
    other = zinit.attach(causal_lm("Llama"), handle.config, seed=2)
    other.load_state_dict(handle.state_dict())
    return other.model


def test_sizes_at_7b() -> None:
    """V1 with images, K = 10, L = 30, four layers of a ViT-L/14: 1.77M; the paper says 1.8M, 0.56M of it projection.

    And V2 as released, its first stage; the sizes of the second are in `test_bias_tuning`.
    """
    import transformers

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig())
    part = zinit.PrefixConfig(length=10, layers=30, prompt="table+context")
    whole = zinit.AdapterConfig(
        parts={"prefix": part}, context="projected-image", context_options={"feature_width": 4 * 1024}
    )
    handle = zinit.attach(model, whole, device="meta")
    assert sum(p.numel() for p in handle.shared["context"].parameters()) == 536_640
    assert handle.num_trainable == 1_229_760 + 536_640
    handle.detach()
    released = zinit.AdapterConfig(
        parts={"prefix": zinit.PrefixConfig(length=10, layers=31, prompt="table+context")},
        context="visual-tokens",
        context_options={"feature_width": 768, "hidden": 768, "blocks": 8, "heads": 16},
    )
    handle = zinit.attach(model, released, device="meta")
    assert sum(p.numel() for p in handle.shared["context"].parameters()) == 60_460_800
    assert handle.num_trainable == 61_731_584 - 32  # V2's first stage; its code keeps gates in layer 0, which has none


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"context": None}, "an encoder needs a context source"),
        ({"context_options": {"feature_width": 7}}, "gives feature_width=12, but .* was made for 7"),
        ({"context_options": {"blokcs": 2}}, "has no setting 'blokcs'. Did you mean 'blocks'"),
        ({"context_options": {"heads": 3, "hidden": 8}}, "cannot be made of"),
        ({"context_options": {"blocks": 10**9}}, "blocks of .* must be above 0 and at most 65,536; got 1000000000"),
        ({"context_options": {"hidden": 0}}, "hidden of .* must be above 0"),
    ],
)
def test_wrong_settings_are_one_message(wrong: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        zinit.attach(
            causal_lm("Llama"),
            zinit.AdapterConfig(**{**vars(config("visual-tokens")), **wrong}),
            encoder=folder,
        )


def test_without_an_encoder_or_a_source_images_are_refused(folder: Path) -> None:
    plain = zinit.attach(causal_lm("Llama"), zinit.PrefixConfig(length=3))
    with pytest.raises(ConfigError, match="takes no images: it has no context source"), plain.given(image=[image(1)]):
        pass
    options = {"feature_width": 12, "hidden": 8, "heads": 2}
    whole = zinit.AdapterConfig(parts={"late": LATE}, context="visual-tokens", context_options=options)
    handle = zinit.attach(causal_lm("Llama"), whole)
    with pytest.raises(ConfigError, match="has no encoder for images"), handle.given(image=[image(1)]):
        pass
    with (
        pytest.raises(ConfigError, match=r"either image=\.\.\. \(or audio=.*, vector=\.\.\.\) or features="),
        handle.given(),
    ):
        pass
    with pytest.raises(ConfigError, match="needs feature_width: name the encoder"):
        zinit.attach(causal_lm("Llama"), zinit.AdapterConfig(parts={"late": LATE}, context="visual-tokens"))
    assert tower("clip").config.projection_dim == 12
