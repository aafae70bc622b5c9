"""An adapter together with the model it was made for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinit.adapter.attach import load
from zinit.adapter.file import AdapterFile
from zinit.errors import CheckpointError
from zinit.models.loading import load_causal_lm

if TYPE_CHECKING:
    import torch

    from zinit.adapter.handle import Handle


def from_pretrained(
    source: str | Path,
    *,
    model: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    name: str = "default",
    revision: str | None = None,
    encoder: Any = None,
) -> Handle:
    """Loads a language model and its adapter.

    Args:
        source: a folder that `Handle.save` or ``zinit train`` wrote, or a Hub id.
        model: where the model lies; default: as the adapter says.
        dtype: of the model's weights; default: float32 on the CPU, else bfloat16.
        device: that the model is read to.
        name: of the adapter on the model.
        revision: of the adapter's Hub repository.
        encoder: see `zinit.load`.

    Returns:
        The handle; ``handle.model`` is the model.

    Raises:
        CheckpointError: if the adapter is missing or damaged, does not say its model, or is of another.
        BackboneError: if the model cannot be loaded as a causal language model.

    Examples:
        >>> handle = zinit.from_pretrained("me/my-adapter")  # doctest: +SKIP
        >>> handle.model.generate(**inputs)  # doctest: +SKIP
    """
    import torch

    where = model or AdapterFile.read(source, revision=revision).fingerprint.get("name_or_path")
    if not where:
        raise CheckpointError(f"{source} does not say which model it was made for: pass model=FOLDER_OR_HUB_ID.")
    default = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    host, _ = load_causal_lm(where, dtype=dtype or default, device=device, tokenizer=False)
    return load(host.eval(), source, name=name, revision=revision, encoder=encoder)
