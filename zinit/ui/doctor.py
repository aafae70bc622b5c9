"""What the command ``doctor`` reports: versions, devices, what they can compute, extras, and whether it all works."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from zinit.adapter.file import AdapterFile
from zinit.backbones import BACKBONES
from zinit.errors import ZinitError, install_extra
from zinit.models.offload import move
from zinit.runs.build import Built, build_model, build_task
from zinit.runs.record import versions
from zinit.runs.settings import resolve

# What each extra installs, by the names that are imported; for developers are the others.
EXTRAS = {
    "quantize": ("bitsandbytes", "torchao"),
    "tensorboard": ("tensorboard",),
    "serve": ("fastapi", "uvicorn", "prometheus_client"),
    "tune": ("optuna",),
    "deepspeed": ("deepspeed",),
    "ocr": ("rapidocr", "onnxruntime"),
    "eval": ("lm_eval",),
    "retrieval": ("faiss",),
    "audio": ("soundfile",),
    "video": ("av",),
    "meteor": ("pycocoevalcap",),
    "ray": ("ray",),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def examine() -> dict[str, Any]:
    """The state of this machine: {"found": {...}, "problems": [...]}."""
    found: dict[str, Any] = dict(versions())
    problems: list[str] = []

    def check(name: str, look: Callable[[], str]) -> None:
        try:
            found[name] = look()
        except Exception as error:  # whatever it is, it is reported
            found[name] = "broken"
            problems.append(f"{name}: {type(error).__name__}: {error}")

    found["cpu threads"] = torch.get_num_threads()
    found["free disk"] = f"{shutil.disk_usage('.').free / 1e9:.1f} GB"
    found["hub"] = "offline (HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE") else "online"
    for extra, packages in EXTRAS.items():
        missing = [package for package in packages if find_spec(package) is None]
        found[f"extra {extra}"] = f"lacks {', '.join(missing)}. {install_extra(extra)}" if missing else "installed"
    for device in devices():
        check(f"{device}", lambda device=device: describe_device(device))
        check(f"{device} dtypes", lambda device=device: ", ".join(dtypes_of(device)))
        check(f"{device} attention", lambda device=device: ", ".join(kernels_of(device)))
        check(f"{device} step", lambda device=device: step_on(device))
    for name in BACKBONES:
        if BACKBONES.get(name).demo_model:
            check(f"demo {name}", lambda name=name: _self_test(name))
    return {"found": found, "problems": problems}


def devices() -> list[torch.device]:
    """The CPU, and every accelerator that there is."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = 0 if kind is None else torch.accelerator.device_count()
    return [torch.device("cpu"), *(torch.device(str(kind), number) for number in range(count))]


def describe_device(device: torch.device) -> str:
    """Its name and memory, as far as torch tells them."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
    if device.type == "cpu":
        return f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    return device.type


def dtypes_of(device: torch.device) -> list[str]:
    """Those whose products and softmax work there."""
    return [str(dtype).removeprefix("torch.") for dtype in DTYPES if _works(lambda dtype=dtype: _attend(device, dtype))]


def kernels_of(device: torch.device) -> list[str]:
    """The kernels of attention that work there, in the dtype that a model would have."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    def attend(kernel: SDPBackend) -> None:
        with sdpa_kernel(kernel):
            _attend(device, dtype)

    return [name for name, kernel in KERNELS.items() if _works(lambda kernel=kernel: attend(kernel))]


def _attend(device: torch.device, dtype: torch.dtype) -> None:
    query = torch.ones(1, 2, 8, 16, device=device, dtype=dtype)
    if not torch.isfinite(F.scaled_dot_product_attention(query @ query.mT @ query, query, query, is_causal=True)).all():
        raise ZinitError("attention computes no numbers")


def _works(action: Callable[[], None]) -> bool:
    try:
        action()
    except Exception:  # torch has many words for "no"
        return False
    return True


def step_on(device: torch.device) -> str:
    """Training steps of the embedded language model lower its loss on two examples."""
    built, task = _demo("llama", device)
    handle = built.adapted.handle
    assert handle is not None
    batch = {name: value.to(device) for name, value in task.collate(task.held_out_stream, [0, 1]).items()}
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.05)
    losses = []
    for _ in range(3):
        loss, count = task(batch), 1
        losses.append(float(loss.detach()) / count)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if not losses[-1] < losses[0]:
        raise ZinitError(f"training steps do not lower the loss: {losses}")
    return f"loss {losses[0]:.2f} to {losses[-1]:.2f} in two steps"


def _demo(backbone: str, device: torch.device) -> tuple[Built, Any]:
    config, _ = resolve(backbone=backbone, seed=0)
    built = build_model(config, device)
    task = build_task(config, built).eval()
    move(task, device)
    return built, task


@torch.no_grad()
def _self_test(backbone: str) -> str:
    """A closed gate changes nothing, an open one does, and an adapter survives saving."""
    built, task = _demo(backbone, torch.device("cpu"))
    handle = built.adapted.handle
    assert handle is not None
    head = getattr(task, "head", None)
    if isinstance(head, nn.Linear):  # a head that starts at zero would hide every change
        head.reset_parameters()
    batch = task.collate(task.held_out_stream, [0, 1])
    with handle.disabled():
        before = task(batch)
    if not torch.equal(task(batch), before):
        raise ZinitError("a closed gate changed the loss")
    for prefix in handle.prefixes.values():
        prefix.gate.fill_(0.5)
    after = task(batch)
    if torch.equal(after, before):
        raise ZinitError("an open gate changed nothing")
    with tempfile.TemporaryDirectory() as folder:
        handle.save(folder)
        AdapterFile.read(folder).check_model(handle.model)
    return f"closed gate exact, open gates change the loss of two examples from {before:.2f} to {after:.2f}"
