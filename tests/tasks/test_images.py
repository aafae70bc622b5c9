"""Examples with images: the loss and the answers are those of `handle.given(image=...)`, example by example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.encoders.test_encoders import tower
from tests.tasks.flags import Flags, FlagsConfig
from tests.tiny import byte_tokenizer, save_tiny_llama
from zinit import AdapterConfig, PrefixConfig, attach
from zinit.encoders.cache import FeatureCache
from zinit.errors import ConfigError
from zinit.models.loading import load_causal_lm
from zinit.runs.images import freeze_what_only_images_use
from zinit.tasks.base import TaskInputs

ADAPTERS = {
    "table+context": AdapterConfig(
        parts={"prefix": PrefixConfig(length=3, prompt="table+context", gate_init="random")}, context="projected-image"
    ),
    "context": AdapterConfig(
        parts={
            "early": PrefixConfig(length=3, layers=(0,), prompt="context", gate_init="random"),
            "late": PrefixConfig(length=2, layers=2, gate_init="random"),
        },
        context="visual-tokens",
        context_options={"hidden": 8, "blocks": 1, "heads": 2},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


def make(folder: Path, root: Path, adapter: AdapterConfig, **settings: Any) -> Flags:
    model, _ = load_causal_lm(folder, dtype=torch.float32)
    handle = attach(model, adapter, seed=0, encoder=tower("timm"))
    source: Any = handle.shared["context"]
    features = FeatureCache(handle.get_encoder(), source, root=root, limit=1.0)
    inputs = TaskInputs(model=model, processor=byte_tokenizer(), handle=handle, features=features)
    task = Flags(inputs, FlagsConfig(max_new_tokens=6, **settings))
    features.fill(task.image_sources())
    return task


@pytest.fixture(params=sorted(ADAPTERS))
def task(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Flags:
    return make(folder, tmp_path, ADAPTERS[request.param])


def naive_loss(task: Flags, example: Any) -> torch.Tensor:
    """Alone, with the images themselves; without one the model is called as it is."""
    ids = torch.tensor([example.ids])

    def logits() -> torch.Tensor:
        return task.model(input_ids=ids).logits[0, :-1]

    assert task.handle is not None
    if example.images:
        with task.handle.given(image=[list(example.images)]):
            found = logits()
    else:
        found = logits()
    start, end = example.answers[0]
    return F.cross_entropy(found[start - 1 : end - 1], ids[0, start:end], reduction="sum")


def test_the_loss_is_that_of_each_example_with_its_own_images(task: Flags) -> None:
    """Gradients too, of everything that trains: examples with one image, with two, and without one share a batch."""
    parameters = {name: p for name, p in task.named_parameters() if p.requires_grad}
    loss = task(task.collate(task.train_stream, range(12)))
    ours = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    expected = torch.stack([naive_loss(task, example) for example in task.train_examples]).sum()
    theirs = dict(zip(parameters, torch.autograd.grad(expected, list(parameters.values())), strict=True))
    assert {len(example.images) for example in task.train_examples} == {0, 1, 2}
    assert torch.allclose(loss, expected, rtol=1e-5)
    for name, gradient in theirs.items():
        assert gradient.abs().max() > 0, name
        assert torch.allclose(ours[name], gradient, atol=1e-4 * float(gradient.abs().max()), rtol=1e-4), name


def test_answers_have_the_images_too(task: Flags) -> None:
    assert task.handle is not None
    examples = task.held_out_examples
    together = task._answer_some(examples, range(len(examples)))
    for example, found in zip(examples, together, strict=True):
        prompt = torch.tensor([example.ids[: example.prompt_length]])
        if example.images:
            with task.handle.given(image=[list(example.images)]):
                alone = task._continue(prompt.tolist(), task.config.max_new_tokens)
        else:
            alone = task._continue(prompt.tolist(), task.config.max_new_tokens)
        assert alone[0].strip() == found
    batch = task.collate(task.held_out_stream, range(len(examples)))
    with task.images.shuffled(), torch.no_grad():  # pyright: ignore[reportOptionalMemberAccess]
        assert task(task.collate(task.held_out_stream, range(len(examples)))) != task(batch)


def test_shuffled_images_are_never_ones_own(task: Flags) -> None:
    assert task.images is not None
    with task.images.shuffled():
        for example in task.train_examples:
            other = task.images._instead.get(example.digests)
            assert (other is None) == (not example.images)
            assert other != example.digests
            assert (task.images.batch([example])["image_present"]).tolist() == [bool(example.images)]
    assert not task.images._instead


def test_off_the_images_play_no_part(task: Flags) -> None:
    assert task.handle is not None
    batch = task.collate(task.train_stream, range(12))
    with task.handle.disabled(), torch.no_grad():
        loss = task(batch)
        plain = sum(F.cross_entropy(task.model(input_ids=torch.tensor([e.ids])).logits[0, e.prompt_length - 1 : -1],
                    torch.tensor(e.ids[e.prompt_length :]), reduction="sum") for e in task.train_examples)  # fmt: skip
    assert loss.item() == pytest.approx(float(plain), rel=1e-5)


def test_images_decide_what_a_run_is(task: Flags, folder: Path, tmp_path: Path) -> None:
    other = make(folder, tmp_path, ADAPTERS["table+context"], images=False)
    assert other.fingerprint() != task.fingerprint()
    assert other.data_report()["train_images_left_out"] == 8
    assert task.data_report()["train_with_image"] == 8
    assert not other.image_sources()
    assert other.controls() == {}


def test_without_images_what_only_they_use_is_not_trained(folder: Path, tmp_path: Path) -> None:
    task = make(folder, tmp_path, ADAPTERS["context"], images=False)
    freeze_what_only_images_use(task)
    loss = task(task.collate(task.train_stream, range(12)))
    loss.backward()
    trained = [p for p in task.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None for p in trained)
    assert task.handle is not None
    groups = task.handle.groups()
    assert not any(p.requires_grad for p in groups["visual"])
    assert all(p.requires_grad for p in groups["language"])


def test_refusals(folder: Path, tmp_path: Path) -> None:
    model, _ = load_causal_lm(folder, dtype=torch.float32)
    handle = attach(model, PrefixConfig(length=2))
    inputs = TaskInputs(model=model, processor=byte_tokenizer(), handle=handle)
    with pytest.raises(ConfigError, match=r"12 examples have images.*--method v1-multimodal.*task\.images=false"):
        Flags(inputs, FlagsConfig())
    with pytest.raises(ConfigError, match="cannot be packed"):
        make(folder, tmp_path, ADAPTERS["table+context"], packing=True)
