"""``adapter.safetensors`` and ``adapter.json``: what an adapter is, and what model it was made for."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zinit.adapter.fingerprint import cosine, fingerprint
from zinit.config import PrefixConfig
from zinit.errors import BackboneError, CheckpointError, ConfigError, first_line
from zinit.files import check_tensors, write_atomically

if TYPE_CHECKING:
    from zinit.adapter.handle import Handle

FORMAT_VERSION = 1
TENSORS, DESCRIPTION = "adapter.safetensors", "adapter.json"
SAME_WEIGHTS = 0.9  # cosine; another dtype or a 4-bit copy of the same weights stays above 0.98


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """A saved adapter in memory.

    Attributes:
        config: how its prefixes are built.
        backbone: registered name.
        fingerprint: of the model it was made for.
        tensors: {parameter name: tensor}.
    """

    config: PrefixConfig
    backbone: str
    fingerprint: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, handle: Handle) -> AdapterFile:
        """The adapter as it is now."""
        return cls(
            config=handle.config,
            backbone=handle.backbone,
            fingerprint=fingerprint(handle.model, list(handle.attachment.sites.values())),
            tensors={name: tensor.cpu().contiguous() for name, tensor in handle.state_dict().items()},
        )

    def write(self, directory: str | Path) -> None:
        """Writes both files, each under a temporary name first.

        Raises:
            CheckpointError: if the folder cannot be written.
        """
        import zinit

        try:
            from safetensors.torch import save

            data = save(self.tensors, metadata={"format": "pt"})
            description = {
                "format_version": FORMAT_VERSION,
                "zinit_version": zinit.__version__,
                "backbone": self.backbone,
                "config": self.config.to_dict(),
                "model": self.fingerprint,
                "sha256": hashlib.sha256(data).hexdigest(),
                "versions": {"torch": torch.__version__},
            }
            Path(directory).mkdir(parents=True, exist_ok=True)
            write_atomically(Path(directory) / TENSORS, data)
            write_atomically(Path(directory) / DESCRIPTION, json.dumps(description, indent=2).encode() + b"\n")
        except OSError as error:
            raise CheckpointError(f"the adapter cannot be written to {directory}: {error}.") from error

    @classmethod
    def read(cls, source: str | Path, *, revision: str | None = None) -> AdapterFile:
        """Reads a folder, or a Hub repository if there is no such folder.

        Raises:
            CheckpointError: if files are missing or damaged.
        """
        folder = Path(source).expanduser()
        if not folder.is_dir():
            folder = _download(str(source), revision)
        for name in (DESCRIPTION, TENSORS):
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder} holds no {name}. Expected a folder that zinit saved an adapter to.")
        try:
            description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
            version = description["format_version"]
            if version > FORMAT_VERSION:
                raise CheckpointError(
                    f"{folder / DESCRIPTION} has format version {version}; this zinit reads up to {FORMAT_VERSION}. "
                    f"Upgrade zinit."
                )
            config = PrefixConfig.from_dict(description["config"])
            backbone, model, sha256 = description["backbone"], description["model"], description["sha256"]
            if not isinstance(backbone, str) or not isinstance(model, dict):
                raise TypeError("backbone must be a name and model its description")
            data = (folder / TENSORS).read_bytes()
        except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
            raise CheckpointError(
                f"{folder / DESCRIPTION} is damaged or unreadable: {what}. Save or copy the adapter again."
            ) from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise CheckpointError(
                f"{folder / TENSORS} is damaged: it is not the file that {DESCRIPTION} beside it describes "
                f"({len(data):,} bytes). Copy both files again, or resume the run that made them."
            )
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            tensors = load(data)
        except SafetensorError as error:
            raise CheckpointError(f"{folder / TENSORS} is no safetensors file: {error}. Save it again.") from error
        return cls(config=config, backbone=backbone, fingerprint=model, tensors=tensors)

    def check_model(self, model: nn.Module, *, weights: bool = True) -> None:
        """Compares the model with the one the adapter was made for, and the tensors with what it will take.

        Raises:
            CheckpointError: naming the field or the tensor that differs.
        """
        from zinit.adapter.handle import ATTRIBUTE
        from zinit.adapter.select import select_sites
        from zinit.backbones import BACKBONES
        from zinit.prefix import ZeroGatedPrefix

        if hasattr(model, ATTRIBUTE):
            sites = list(getattr(model, ATTRIBUTE).sites.values())
        else:
            try:
                sites = BACKBONES.get(self.backbone).sites(model)
            except (BackboneError, ConfigError) as error:
                raise CheckpointError(
                    f"this adapter was made for another model: backbone is {self.backbone!r}, and that cannot take "
                    f"{type(model).__name__}: {error}"
                ) from error
        found = fingerprint(model, sites)
        for field, expected in self.fingerprint.items():
            if field in ("key_probe", "name_or_path", "revision"):
                continue
            if found.get(field) != expected:
                raise CheckpointError(
                    f"this adapter was made for another model: {field} is {found.get(field)!r} here, "
                    f"but {expected!r} where it was trained. Load it onto "
                    f"{self.fingerprint.get('name_or_path') or 'the model it was trained on'}."
                )
        ours, theirs = found.get("key_probe"), self.fingerprint.get("key_probe")
        if weights and ours and theirs:
            agreement = cosine(ours, theirs)
            if not agreement >= SAME_WEIGHTS:
                raise CheckpointError(
                    f"this adapter was made for other weights of the same shape: key_probe (the first layer's keys "
                    f"of a fixed vector) agrees only to {agreement:.2f}. It was trained on "
                    f"{self.fingerprint.get('name_or_path') or 'an unnamed model'}. Pass check_weights=False if the "
                    f"base was merely tuned since (in Python: zinit.load)."
                )
        try:
            adapted = select_sites(model, sites, self.config)
        except BackboneError as error:
            raise CheckpointError(f"the adapter does not fit: {error}") from error
        expected_shapes: dict[str, tuple[int, ...]] = {}
        for site in adapted:
            prefix = ZeroGatedPrefix(self.config, **site.shape(), device="meta", generator=None)
            for name, parameter in prefix.named_parameters():
                expected_shapes[f"{site.name}.{name}"] = tuple(parameter.shape)
        check_tensors(self.tensors, expected_shapes)


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    looks_local = repository.startswith((".", "/", "~")) or repository.count("/") != 1
    if looks_local:
        raise CheckpointError(f"there is no adapter folder {repository}.")
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=[TENSORS, DESCRIPTION]))
    except Exception as error:
        raise CheckpointError(
            f"there is no adapter folder {repository}, and the Hub did not give one: {first_line(error)}"
        ) from error
