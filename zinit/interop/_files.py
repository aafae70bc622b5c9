"""Reads other implementations' files safely, and recognizes them by the names of their tensors."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zinit.errors import CheckpointError
from zinit.files import check_plain, is_file, is_folder, is_lfs_pointer, parsing


def read_pickle(path: Path, *, allow: tuple[type, ...] = ()) -> Any:
    """Loads what ``torch.save`` wrote: tensors and plain values only; code in the file is never run.

    Args:
        path: the file.
        allow: further harmless classes that such files hold.

    Raises:
        CheckpointError: if the file is missing, damaged, or asks for any other class.
    """
    _check_file(path)
    try:
        with torch.serialization.safe_globals(list(allow)):
            # Memory-mapped: a full training checkpoint has 13 GB, of which the adapter is 5 MB.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        asks_for = re.search(r"GLOBAL\s+([\w.]+)", str(error))
        if asks_for:
            raise CheckpointError(
                f"{path} was not loaded: besides tensors it asks for {asks_for[1]}, which could run code on this "
                f"machine. If you trust its origin, save only its tensors and import those."
            ) from error
        raise CheckpointError(
            f"{path} is damaged, or not a file that torch.save wrote ({path.stat().st_size:,} bytes). Download or copy "
            f"it again."
        ) from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CheckpointError: if the file is missing or damaged.
    """
    from safetensors.torch import load

    _check_file(path)
    what = f"{path} is damaged, or not a safetensors file that can be read ({path.stat().st_size:,} bytes)"
    with parsing(what, CheckpointError, "Download or copy it again."):
        return load(path.read_bytes())


def tensors_in(content: Any, path: Path, *, unwrap: str | None = None) -> dict[str, Tensor]:
    """The named tensors of a loaded pickle.

    Args:
        content: what `read_pickle` returned.
        path: for messages.
        unwrap: an entry that may hold them in place of the top level.

    Raises:
        CheckpointError: if there are none.
    """
    if unwrap is not None and isinstance(content, dict) and isinstance(content.get(unwrap), dict):
        content = content[unwrap]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}. Expected a dictionary of named tensors.")
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no named tensors. Expected an adapter.")
    return tensors


def pickled(content: Any) -> bytes:
    """``torch.save`` to memory, so that the file can be written atomically."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _check_file(path: Path) -> None:
    if not is_file(path):
        found = "is a folder" if is_folder(path) else "does not exist, or is no regular file"
        raise CheckpointError(f"{path} {found}. Expected an adapter's file.")
    try:
        pointer = is_lfs_pointer(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if pointer:
        raise CheckpointError(
            f"{path} is a Git LFS pointer of {path.stat().st_size} bytes, not the file itself. Run `git lfs pull` "
            f"where it was cloned, or download the file."
        )


@dataclass(frozen=True)
class Kind:
    """A kind of file, recognized by the names of its tensors.

    Args:
        title: what it is.
        formats: the names under which zinit imports it; empty if it does not.
        why_not: if it does not, what the file holds that a prefix cannot express.
        has: whether a tensor of this name marks the kind.
        own: whether a tensor of this name is the adapter's; the file may hold a whole model beside it.
    """

    title: str
    formats: tuple[str, ...]
    why_not: str
    has: Callable[[str], bool]
    own: Callable[[str], bool] = lambda name: True


KINDS = (  # the first match counts; the modules of this package describe each
    Kind(
        "an official ImageBind-LLM adapter",
        ("imagebind-llm",),
        "",
        lambda name: name.startswith("image_bind_"),
        lambda name: re.search(r"^image_bind\.|\.w[qkvo123]\.weight$", name) is None,  # not ImageBind and LLaMA
    ),
    Kind(
        "an official V1 caption adapter",
        ("official-v1",),
        "",
        lambda name: name.startswith("cap_adapter_query.") or name.endswith(".attention.cap_gate"),
        lambda name: (
            name.startswith(("cap_adapter_query.", "adapter_query.", "clip_proj", "visual_"))
            or name.endswith((".attention.cap_gate", ".attention.gate"))
        ),
    ),
    Kind(
        "an official V2 multi-modal adapter",
        ("official-v2",),
        "",
        lambda name: name.startswith(("visual_query.", "visual_blocks.", "prefix_projector.")),
    ),
    Kind(
        "an official V2 chat adapter",
        ("official-v2-chat",),
        "",
        lambda name: re.search(r"\.w[qkvo123]_(bias|scale)$", name) is not None,
    ),
    Kind(
        "a LitGPT adapter_v2",
        ("litgpt-v2", "litgpt-v2-legacy"),
        "",
        lambda name: name.endswith((".adapter_bias", ".adapter_scale")),
    ),
    Kind(
        "a LitGPT adapter",
        ("litgpt", "litgpt-legacy"),
        "",
        lambda name: name.endswith(".adapter_wte.weight"),
        lambda name: name.endswith((".adapter_wte.weight", ".gating_factor")),
    ),
    Kind(
        "a PEFT AdaptionPrompt",
        ("peft",),
        "",
        lambda name: name.endswith(".adaption_prompt"),
        lambda name: name.endswith((".adaption_prompt", ".adaption_gate")),
    ),
    Kind(
        "an official V1 adapter",
        ("official-v1",),
        "",
        lambda name: name == "adapter_query.weight",
        lambda name: name == "adapter_query.weight" or name.endswith(".attention.gate"),
    ),
)


def adapter_tensors(tensors: Mapping[str, Tensor], path: Path, format: str) -> dict[str, Tensor]:
    """The tensors of the adapter that a file holds, safe to compute with; the file must be of the requested format.

    Args:
        tensors: all of the file.
        path: for messages.
        format: the requested format.

    Raises:
        CheckpointError: naming what the file is instead, and how it is imported or why it cannot be; or the tensor
            that is none with plain, finite numbers.
    """
    kind = next((kind for kind in KINDS if any(kind.has(name) for name in tensors)), None)
    if kind is None:
        raise CheckpointError(
            f"{path} holds no adapter that zinit knows. Its tensors are named {', '.join(sorted(tensors)[:3])} ..."
        )
    if kind.why_not:
        raise CheckpointError(f"{path} is {kind.title}, which zinit does not import: {kind.why_not}.")
    if format not in kind.formats:
        known = " or ".join(f"format={name!r}" for name in kind.formats)
        raise CheckpointError(f"{path} is {kind.title}. Import it with {known}; got format={format!r}.")
    own = {name: tensor for name, tensor in tensors.items() if kind.own(name)}
    check_plain(own, path)
    return own
