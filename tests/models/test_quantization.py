"""Quantised hosts: the prefix on top of them is the formula on their dequantised weights, and none of these trains."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zinit
from tests.contract.cases import causal_lm, clip, text_batch
from tests.contract.naive import Tensors
from tests.contract.test_oracle import check, relative_error
from tests.tasks.encoder import save_tiny_encoder
from tests.tasks.vit import save_tiny
from tests.tiny import byte_tokenizer, save_records
from tests.train.test_crash import steps
from zinit import cli, demo
from zinit.adapter.fingerprint import fingerprint
from zinit.backbones import BACKBONES
from zinit.errors import ConfigError
from zinit.methods import METHODS
from zinit.methods.base import ApplyContext
from zinit.models import quantization
from zinit.models.loading import load_causal_lm, load_clip, load_encoder
from zinit.models.quantization import QUANTIZATIONS, is_quantized
from zinit.models.timm import load_timm
from zinit.runs.evaluate import evaluate_run
from zinit.runs.settings import resolve
from zinit.tasks.base import load_host
from zinit.train.strategy import make_accelerator, place

KINDS = sorted(QUANTIZATIONS)
OPEN = zinit.PrefixConfig(length=5, layers=2, gate_init=0.7)
RUN = ("steps=6", "batch_size=16", "micro_batch_size=8", "learning_rate=0.03", "warmup_steps=0", "save_every=3",
       "evaluate_every=0", "task.evaluation_limit=2", "task.max_new_tokens=4",
       "task.max_length=256")  # fmt: skip


def llama(quantize: Any = None) -> Any:
    return load_causal_lm(demo.llama_path(), dtype=torch.float32, quantize=quantize, tokenizer=False)[0]


def dequantized(model: nn.Module) -> Tensors:
    """The state dict as whoever quantised it says that it is, in float64."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    weights: Tensors = {}
    for name, parameter in model.named_parameters():
        module: Any = model.get_submodule(name.rpartition(".")[0])
        value: Any = parameter.data
        if type(parameter).__name__ == "Params4bit":
            value = dequantize_4bit(value, parameter.quant_state)  # pyright: ignore[reportAttributeAccessIssue]
        elif type(parameter).__name__ == "Int8Params":
            scale = parameter.SCB if module.state.SCB is None else module.state.SCB  # pyright: ignore
            value = int8_vectorwise_dequant(value, scale)
        elif type(value) is not Tensor:
            value = value.dequantize()
        weights[name] = value.double()
    return weights


def logits(model: Any) -> Tensor:
    return model(**text_batch("left")).logits


def encoded(model: Any) -> Tensor:
    return model(**text_batch("right")).last_hidden_state


def embeddings(model: Any) -> Tensor:
    output = model(**text_batch("right"), pixel_values=pictures())
    return torch.cat([output.image_embeds, output.text_embeds])


def pictures() -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hosts")
    clip().save_pretrained(folder / "clip")  # pyright: ignore[reportCallIssue]
    byte_tokenizer().save_pretrained(folder / "clip")
    encoder, vit = save_tiny_encoder(folder / "encoder"), save_tiny(folder / "vit")
    return {"llama": demo.llama_path(), "roberta": encoder, "clip": folder / "clip", "vit": vit}


LOADERS: dict[str, tuple[Callable[..., Any], Callable[[Any], Tensor]]] = {
    "clip": (load_clip, embeddings),
    "llama": (load_causal_lm, logits),
    "roberta": (load_encoder, encoded),
    "vit": (load_timm, lambda model: model(pictures())),
}
HOSTS = [(name, kind) for name in LOADERS for kind in KINDS if name != "vit" or kind == "torchao-int8"]


@pytest.mark.parametrize("quantize", KINDS)
def test_the_oracle_on_dequantised_weights(quantize: str) -> None:
    """Outputs and the gradients of prompts and gates, within 1e-5 in float32: after an evaluation, as in a run."""
    model = llama(quantize)
    with torch.no_grad():
        evaluated = logits(model)
        plain = logits(model.train())
    # On a CPU LLM.int8() rounds what goes into a matrix in evaluation only; the others are as exact as in training.
    assert relative_error(evaluated, plain.double()) < 0.1
    assert torch.equal(evaluated, plain) == (quantize != "bnb-8bit")
    weights = dequantized(model)
    for padding in ("left", "none"):
        check(model, zinit.PrefixConfig(length=5, layers=2), padding, weights=weights)
        zinit.get_handle(model).detach()
    name = "model.layers.0.mlp.up_proj.weight"
    before = llama().state_dict()[name].double()
    assert 0 < (weights[name] - before).abs().max() < 0.2 * before.abs().max()


@pytest.mark.parametrize("quantize", KINDS)
def test_a_tuning_starts_at_the_quantised_host_and_trains(quantize: str) -> None:
    model = llama(quantize).train()
    before = logits(model).detach()
    tuning = zinit.TuningConfig(lora_rank=2, linears=("all", "head"))
    handle = zinit.attach(model, zinit.AdapterConfig(parts={}, tuning=tuning), seed=0)
    start = logits(model)
    assert torch.equal(start, before)
    start.square().mean().backward()
    still = {name for name, p in handle.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == {name for name in still if name.endswith("lora_down")}  # waits until what follows it has moved
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.sub_(0.01 * parameter.grad.sign())  # pyright: ignore[reportOptionalMemberAccess]
        assert logits(model).square().mean() < before.square().mean()
        with handle.disabled():
            assert torch.equal(logits(model), before)


@pytest.mark.parametrize(("name", "quantize"), HOSTS)
def test_a_closed_gate_is_the_quantised_host_and_only_the_prefix_trains(
    name: str, quantize: Any, sources: dict[str, Path]
) -> None:
    load, call = LOADERS[name]
    plain = load(sources[name], dtype=torch.float32)[0].eval()
    model = load(sources[name], dtype=torch.float32, quantize=quantize)[0]
    assert is_quantized(model)
    assert not is_quantized(plain)
    for mode in (False, True):
        model.train(mode)
        with torch.no_grad():
            before = call(model)
            handle = zinit.attach(model, zinit.PrefixConfig(length=5), backbone=name, seed=0)
            assert torch.equal(call(model), before)
            if mode is False:
                assert 0 < relative_error(before, call(plain).double()) < 0.5
        handle.detach()
        assert torch.equal(call(model).detach(), before)
    handle = zinit.attach(model, OPEN, backbone=name, seed=0)
    with torch.no_grad(), handle.disabled():
        assert torch.equal(call(model), before)
    call(model).square().sum().backward()
    own = dict(handle.named_parameters())
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in own.values()}
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.abs().max() > 0 for p in own.values())


@pytest.mark.parametrize("quantize", KINDS)
def test_generation_keeps_the_prompts_keys(quantize: str) -> None:
    """With keys and values computed ahead the answer is the one of whole forward passes."""
    model = llama(quantize).eval()
    handle = zinit.attach(model, zinit.PrefixConfig(length=5, init_std=1.0, gate="identity", gate_init=3.0), seed=0)
    ids = torch.arange(5, 25)[None]
    answer = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    for length in range(ids.shape[1], answer.shape[1]):
        if quantize != "bnb-8bit":  # there a token's rounding depends on its neighbours
            assert model(input_ids=answer[:, :length]).logits[0, -1].argmax() == answer[0, length]
    with handle.disabled():
        assert not torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None), answer)


@pytest.mark.parametrize("quantize", KINDS)
def test_the_prompts_keys_are_kept_in_the_hosts_dtype(quantize: Any) -> None:
    model, _ = load_causal_lm(demo.llama_path(), dtype=torch.bfloat16, quantize=quantize, tokenizer=False)
    handle = zinit.attach(model, OPEN, seed=0)
    with handle.frozen_prefix():
        kept = [slot.cached_kv for slot in handle.state.slots.values()]
    assert all(pair is not None and {tensor.dtype for tensor in pair} == {torch.bfloat16} for pair in kept)


@pytest.mark.parametrize("quantize", KINDS)
def test_a_discovered_host(quantize: Any, tmp_path: Path) -> None:
    """Keys, values and queries in one matrix without a bias: when quantised, the module has no other weight."""
    causal_lm("Phi3").save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    model, _ = load_causal_lm(tmp_path, dtype=torch.float32, quantize=quantize, tokenizer=False)
    with torch.no_grad():
        before = logits(model)
        handle = zinit.attach(model, OPEN, seed=0)
        assert handle.backbone == "transformers"
        assert relative_error(logits(model), before.double()) > 0.01
        with handle.disabled():
            assert torch.equal(logits(model), before)


@pytest.mark.parametrize("quantize", KINDS)
def test_adapters_go_between_a_host_and_its_quantised_copy(quantize: str, tmp_path: Path) -> None:
    for made_on, loaded_on in ((quantize, None), (None, quantize), (quantize, quantize)):
        handle = zinit.attach(llama(made_on), OPEN, seed=1)
        handle.save(tmp_path / f"{made_on}")
        expected, model = logits(handle.model), llama(loaded_on)
        zinit.load(model, tmp_path / f"{made_on}")
        tolerance = 1e-6 if made_on == loaded_on else 0.3
        assert relative_error(logits(model).detach(), expected.detach().double()) < tolerance


@pytest.mark.parametrize("quantize", KINDS)
def test_lora_on_a_quantised_host(quantize: str) -> None:
    model = llama(quantize).train()
    with torch.no_grad():
        before = logits(model)
    method = METHODS.get("lora")
    settings = method.Config(dropout=0.0)
    adapted = method(settings).apply(model, ApplyContext(prefix=zinit.PrefixConfig(), backbone="llama", seed=0))
    trained = {name: p for name, p in adapted.model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    with torch.no_grad():
        assert torch.equal(logits(adapted.model), before)
    logits(adapted.model).square().mean().backward()
    assert all(p.grad is not None for p in trained.values())
    torch.optim.SGD(trained.values(), lr=0.1).step()
    assert not torch.equal(logits(adapted.model), before)
    with torch.no_grad(), adapted.disabled():
        assert torch.equal(logits(adapted.model), before)


@pytest.mark.parametrize(
    ("quantize", "method"), [("bnb-4bit", "zero-init"), ("bnb-8bit", "lora"), ("torchao-int8", "zero-init")]
)
def test_a_run(quantize: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command line: trained, cut short, resumed to the same bits, evaluated."""
    data, run = save_records(tmp_path / "data.json"), tmp_path / "run"
    options = [word for option in (*RUN, f"quantize={quantize}", f"method={method}") for word in ("-o", option)]
    inputs = ["--backbone", "llama", "--model", str(demo.llama_path()), "--data", str(data)]

    def call(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["zinit", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code

    call("train", *inputs, *options, "--output", str(run))
    losses = steps(run)
    assert losses[6] < 0.9 * losses[1]
    results = json.loads((run / "metrics.json").read_text())
    probes = [fingerprint(host, BACKBONES.get("llama").sites(host))["key_probe"] for host in (llama(quantize), llama())]
    assert [json.loads((run / "run.json").read_text())["key_probe"] == probe for probe in probes] == [True, False]
    kept = {file.name: file.read_bytes() for file in run.glob("*.safetensors")}
    for name in (*kept, "resume/step-00000006"):
        (shutil.rmtree if (run / name).is_dir() else Path.unlink)(run / name)
    call("train", "--resume", "--output", str(run))
    assert {file.name: file.read_bytes() for file in run.glob("*.safetensors")} == kept
    assert kept
    assert evaluate_run(run)["metrics"] == results["metrics"]


def test_what_cannot_be_is_refused(sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("full", "bitfit"):
        with pytest.raises(ConfigError, match=f"quantize=bnb-4bit is for a frozen model, and the method '{method}'"):
            resolve(backbone="llama", options=["quantize=bnb-4bit", f"method={method}"])
    with pytest.raises(ConfigError, match="quantize must be one of 'bnb-8bit', 'bnb-4bit', 'torchao-int8', or none"):
        resolve(backbone="llama", options=["quantize=gptq"])
    assert resolve(backbone="llama", options=["quantize=none"])[0].quantize is None
    for quantize in ("bnb-8bit", "bnb-4bit"):
        with pytest.raises(ConfigError, match=f"quantize={quantize} is for models of transformers; timm's take"):
            load_timm(sources["vit"], dtype=torch.float32, quantize=quantize)
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    for load, name in ((load_causal_lm, "llama"), (load_clip, "clip"), (load_timm, "vit")):
        with pytest.raises(ConfigError, match=r"needs the package torchao, .* pip install -e '\.\[quantize\]'"):
            load(sources[name], dtype=torch.float32, quantize="torchao-int8")


class Own:
    """A task from before there were quantised hosts."""

    name = "own"

    @staticmethod
    def load_model(source: Path, *, dtype: torch.dtype, revision: str | None = None) -> tuple[Any, Any]:
        return load_causal_lm(source, dtype=dtype, revision=revision)


def test_a_task_of_ones_own_need_not_know_of_it(tmp_path: Path) -> None:
    own: Any = Own
    how = {"dtype": torch.float32, "revision": None, "device": torch.device("cpu")}
    model, _ = load_host(own, demo.llama_path(), trains=True, quantize=None, **how)
    assert not is_quantized(model)
    with pytest.raises(ConfigError, match="the task 'own' cannot quantise its model"):
        load_host(own, demo.llama_path(), trains=False, quantize="bnb-4bit", **how)
    llama("bnb-4bit").save_pretrained(tmp_path)  # a checkpoint that is quantised itself
    load_causal_lm(demo.llama_path(), dtype=torch.float32)[1].save_pretrained(tmp_path)
    assert is_quantized(load_host(own, tmp_path, trains=False, quantize=None, **how)[0])
    with pytest.raises(ConfigError, match="is quantised, and quantised weights cannot be trained"):
        load_host(own, tmp_path, trains=True, quantize=None, **how)


def test_a_quantised_host_is_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    task: Any = nn.Module()
    task.model = llama("bnb-4bit")
    config, _ = resolve(backbone="llama")
    monkeypatch.setattr("zinit.train.strategy.is_sharded", lambda accelerator: True)
    with pytest.raises(ConfigError, match="a quantised model cannot be sharded"):
        place(task, make_accelerator(config.train))
