"""A host whose blocks stay in CPU memory: the same outputs, gradients and runs, and no weight held between uses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop

import zinit
from tests.contract.cases import CASES, Case, timm_beit
from tests.tiny import save_records, save_tiny_llama
from tests.train.test_crash import steps
from zinit.errors import ConfigError
from zinit.methods import METHODS
from zinit.methods.base import ApplyContext
from zinit.models.offload import is_offloaded, move, weights_in_place
from zinit.runs.config import RunConfig
from zinit.runs.directory import save_trained
from zinit.runs.evaluate import evaluate_run
from zinit.runs.settings import resolve
from zinit.runs.train import train_run
from zinit.train.strategy import checkpoint_activations, loading_device
from zinit.ui.chat import ChatSession

CPU = torch.device("cpu")
RUN = ("prefix.length=3", "steps=4", "batch_size=8", "micro_batch_size=4", "task.evaluation_limit=2", "save_every=2",
       "task.max_new_tokens=5", "learning_rate=0.02", "warmup_steps=0",
       "train.gradient_checkpointing=true")  # fmt: skip
LEADERS = sorted({case.backbone: case for case in reversed(CASES)}.values(), key=str)


@pytest.fixture(params=LEADERS, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def adapted(case: Case, method: str) -> tuple[Any, dict[str, Tensor]]:
    """A host in training with activations recomputed, and what trains."""
    prefix = zinit.PrefixConfig(length=4, layers=2, gate_init=0.5)
    found = METHODS.get(method)
    settings = found.Config(dropout=0.0) if method == "lora" else found.Config()
    context = ApplyContext(prefix=prefix, backbone=case.backbone, seed=0)
    model = found(settings).apply(case.build(), context).model.train()
    checkpoint_activations(model)
    return model, {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(case: Case, model: Any, trained: dict[str, Tensor]) -> dict[str, Any]:
    with set_checkpoint_early_stop(not is_offloaded(model)):  # as the engine does
        case.output(model, case.batch("left")).square().sum().backward()
    return {name: parameter.grad for name, parameter in trained.items()}


@pytest.mark.parametrize("method", ["lora", "zero-init"])
def test_outputs_and_gradients_are_the_same_to_the_bit(case: Case, method: str) -> None:
    plain, trained = adapted(case, method)
    expected = case.output(plain, case.batch("left"))
    wanted = gradients(case, plain, trained)
    model, trained = adapted(case, method)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    move(model, CPU, offload=True)
    assert all(not parameter.is_meta for parameter in trained.values())
    away = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    assert away < frozen
    assert torch.equal(case.output(model, case.batch("left")), expected)
    found = gradients(case, model, trained)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())
    assert {name for name, parameter in model.named_parameters() if parameter.is_meta} == away
    move(model, CPU)  # a second time, as the engine does
    assert {name for name, parameter in model.named_parameters() if parameter.is_meta} == away


def matrices(model: Any) -> dict[int, str]:
    """Where the blocks' weights lie. On a CPU the copy that a layer is lent lies there too."""
    return {
        p.data_ptr() or -number: name
        for number, (name, p) in enumerate(model.named_parameters())
        if "layers" in name.split(".") and p.dim() > 1 and "zinit" not in name.split(".")
    }


def held(model: Any, case: Case, own: dict[int, str]) -> list[str]:
    """The blocks' weights that autograd keeps from the forward to the backward pass."""
    kept: list[str] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.extend(own[tensor.data_ptr()] for _ in range(tensor.data_ptr() in own))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = case.output(model, case.batch("left"))
    assert output.requires_grad
    return kept


def test_only_recomputed_blocks_are_let_go() -> None:
    """Why offloading needs checkpointing: autograd keeps the weights of the adapted layers, else none."""
    case = next(case for case in CASES if case.name == "llama")
    model, _ = adapted(case, "zero-init")
    own = matrices(model)
    assert len(own) == 3 * 7
    zinit.attach(model, zinit.PrefixConfig(length=2), name="second")
    zinit.get_handle(model).activate()
    move(model, CPU, offload=True)
    assert not any(parameter.is_meta for parameter in zinit.get_handle(model, "second").parameters())
    assert held(model, case, own) == []
    model.activation_checkpointing_disable()
    assert len(set(held(model, case, own))) > 7


def test_one_layer_at_a_time() -> None:
    case = next(case for case in CASES if case.name == "llama")
    model, _ = adapted(case, "zero-init")
    names = set(matrices(model).values())
    move(model, CPU, offload=True)
    present: list[list[str]] = []
    for layer in model.model.layers:
        for module in (layer.self_attn.k_proj, layer.mlp.down_proj):
            inner = module._old_forward
            module._old_forward = lambda x, inner=inner: (
                present.append([n for n, p in model.named_parameters() if n in names and not p.is_meta]) or inner(x)
            )
    gradients(case, model, {})
    assert {tuple(now) for now in present} == {
        (f"model.layers.{i}.{part}.weight",) for i in range(3) for part in ("self_attn.k_proj", "mlp.down_proj")
    }
    # Forward and again in the backward pass; each time for the words and, in the topmost two layers, for the prompts.
    assert present.count(["model.layers.2.self_attn.k_proj.weight"]) == 4
    assert present.count(["model.layers.0.mlp.down_proj.weight"]) == 1


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("inputs")
    return {"model": str(save_tiny_llama(folder / "model")), "data": str(save_records(folder / "data.json"))}


def test_a_run_and_what_is_done_with_it(inputs: dict[str, Any], tmp_path: Path) -> None:
    configs = {
        name: resolve(backbone="llama", options=[*RUN, f"offload={name}"], **inputs)[0] for name in ("false", "true")
    }
    lent: list[bool] = []

    def save(task: Any, *arguments: Any, **options: Any) -> None:
        """At the end of the training everything has been given back."""
        lent.append({n for n, p in task.model.named_parameters() if p.is_meta} == set(matrices(task.model).values()))
        save_trained(task, *arguments, **options)

    for name, config in configs.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("zinit.runs.train.save_trained", save)
            train_run(config, tmp_path / name)
    assert lent == [False, True]
    plain, offloaded = tmp_path / "false", tmp_path / "true"
    assert steps(offloaded) == steps(plain)
    files = ("adapter.safetensors", "adapter.json")
    for file in files:
        assert (offloaded / file).read_bytes() == (plain / file).read_bytes()
    metrics = [json.loads((run / "metrics.json").read_text())["metrics"] for run in (plain, offloaded)]
    assert metrics[0] == metrics[1] == evaluate_run(offloaded)["metrics"]
    one, other = (ChatSession(run, temperature=0, max_new_tokens=6) for run in (plain, offloaded))
    assert [is_offloaded(speaker.model) for speaker in (one, other)] == [False, True]
    assert one.answer("Say red", stream=False) == other.answer("Say red", stream=False)
    for file in files:  # cut short, and gone on with without offloading
        (offloaded / file).unlink()
    next((offloaded / "resume").glob("step-*4")).rename(tmp_path / "gone")
    train_run(configs["false"], offloaded, resume=True)
    assert (offloaded / files[0]).read_bytes() == (plain / files[0]).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["train.gradient_checkpointing=false"], "offload=true needs train.gradient_checkpointing=true"),
        (["quantize=bnb-4bit"], "offload=true needs quantize=none"),
        (["train.compile=true"], "offload=true needs train.compile=false"),
        (["method=full"], "offload=true is for a frozen model, and the method 'full' trains its weights"),
        (["offload=yes"], "offload must be true or false; got 'yes'"),
    ],
)
def test_what_offloading_cannot_go_with_is_refused(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(backbone="llama", options=["train.gradient_checkpointing=true", "offload=true", *options])


def test_where_weights_are_loaded_to() -> None:
    assert RunConfig.offload is False
    gpu = torch.device("cuda", 1)
    kinds = {name: SimpleNamespace(value=name) for name in ("NO", "FSDP", "DEEPSPEED")}
    alone: Any = SimpleNamespace(num_processes=1, device=gpu, is_fsdp2=False, distributed_type=kinds["NO"])
    assert loading_device(alone) == gpu
    assert loading_device(alone, offload=True) == CPU
    zero3: Any = SimpleNamespace(num_processes=2, device=gpu, is_fsdp2=False, distributed_type=kinds["DEEPSPEED"])
    assert loading_device(zero3) == CPU
    several: Any = SimpleNamespace(num_processes=2, device=gpu, is_fsdp2=True, distributed_type=kinds["FSDP"])
    assert loading_device(several) == CPU
    with pytest.raises(ConfigError, match="offload=true is for one process; 2 were launched"):
        loading_device(several, offload=True)


def test_a_host_that_reads_the_weights_of_a_layer_is_refused() -> None:
    model = timm_beit().requires_grad_(False)
    move(model, CPU, offload=True)
    with pytest.raises(ConfigError, match=r"reads a layer's weights without calling"), weights_in_place(model):
        model(torch.randn(1, 3, 16, 16))


def test_nothing_to_lend_is_said() -> None:
    with pytest.raises(ConfigError, match="no repeated blocks in Linear"):
        move(torch.nn.Linear(4, 4), CPU, offload=True)
