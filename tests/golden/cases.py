"""The golden cases: how each is imported, its model, its inputs and what the other implementation computed."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import zinit

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"

CASES = {  # case: how it is imported, and the label that its loss ignores (None: no loss in the case)
    "official-v1-text": ({"format": "official-v1", "length": 5}, 0),
    "official-v1-text-zero-gate": ({"format": "official-v1", "length": 5}, 0),
    "official-v1-text-greedy": ({"format": "official-v1", "length": 5, "gate": "identity"}, None),
    "official-v1-initial-scalar-greedy": ({"format": "official-v1", "length": 5}, None),
    "peft-llama": ({"format": "peft"}, -100),
    "peft-mistral": ({"format": "peft"}, -100),
    "litgpt-adapter-v1": ({"format": "litgpt"}, -100),
    "litgpt-adapter-v1-legacy": ({"format": "litgpt-legacy"}, -100),
    "official-v2-chat": ({"format": "official-v2-chat", "length": 5}, 0),
    "official-v2-chat-noprompt": ({"format": "official-v2-chat"}, 0),
    "official-v2-multimodal-bias": ({"format": "official-v2", "length": 5, "heads": 4}, 0),
    "official-v2-multimodal-lora": ({"format": "official-v2", "length": 5, "heads": 4}, 0),
    "imagebind-llm": ({"format": "imagebind-llm"}, 0),
    "litgpt-adapter-v2": ({"format": "litgpt-v2"}, -100),
    "litgpt-adapter-v2-legacy": ({"format": "litgpt-v2-legacy"}, -100),
}
WITH_LOSS = [case for case, (_, ignored) in CASES.items() if ignored is not None]
WITH_GENERATION = [case for case in CASES if not case.startswith("official-v1-text") or case.endswith("greedy")]
REFUSED = {  # case: how one might try, and what the message must name
    "peft-gpt2": ({"format": "peft"}, r"after the output projection.*off by up to 145% of its size"),
}


def adapter_path(case: str) -> Path:
    folder = GOLDEN / case
    return next(path for name in ("adapter.pth", "adapter", "lit_model.pth.adapter*") for path in folder.glob(name))


def base_model(case: str, implementation: str = "sdpa") -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        GOLDEN / case / "base", attn_implementation=implementation, dtype=torch.float32
    ).eval()


def adapted(case: str, implementation: str = "sdpa") -> tuple[torch.nn.Module, zinit.Handle]:
    model = base_model(case, implementation)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return model, zinit.import_adapter(model, adapter_path(case), **CASES[case][0], **encoder_of(case))


def encoder_of(case: str) -> dict:
    """The case's own vision tower, where it has one."""
    return {"encoder": GOLDEN / case / "vision"} if (GOLDEN / case / "vision").is_dir() else {}


def seen(handle: zinit.Handle, inputs: dict, rows: slice = slice(None)) -> AbstractContextManager:
    """The images of a case's rows, or their features, where it has some."""
    if "imagebind_feats" in inputs:
        return handle.given(features=inputs["imagebind_feats"][rows])
    return handle.given(image=inputs["images"][rows]) if "images" in inputs else nullcontext()


def tensors(case: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return load_file(GOLDEN / case / "inputs.safetensors"), load_file(GOLDEN / case / "expected.safetensors")


def assert_close(got: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5, absolute: float = 0.0) -> None:
    assert got.shape == expected.shape
    difference, bound = (got - expected).abs().max().item(), relative * expected.abs().max().item() + absolute
    assert difference <= bound, f"{difference:.3g} > {bound:.3g}"
