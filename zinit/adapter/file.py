"""``adapter.safetensors`` and ``adapter.json``: what an adapter is, and what model it was made for."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zinit.adapter.build import build_modules
from zinit.adapter.fingerprint import cosine, fingerprint
from zinit.adapter.state import state_of
from zinit.backbones import BACKBONES
from zinit.config import AdapterConfig, PrefixConfig
from zinit.errors import BackboneError, CheckpointError, ConfigError, first_line
from zinit.files import check_plain, check_tensors, is_file, is_folder, local_path, parsing, read_json, write_atomically

if TYPE_CHECKING:
    pass

FORMAT_VERSION = 2  # of parts, shared modules and tunings; one plain prefix is still written as 1
TENSORS, SOURCE, DESCRIPTION = "adapter.safetensors", "source.safetensors", "adapter.json"
FILES = {TENSORS: "sha256", SOURCE: "source_sha256"}  # and where the description holds their hashes
OF_SOURCE = "shared.context."  # how the names of what makes a context begin
SINCE_2 = {"prompt": "table", "prompts": "table"}  # settings of a prefix that version 1 does not know
SAME_WEIGHTS = 0.9  # cosine; another dtype or a 4-bit copy of the same weights stays above 0.98


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """A saved adapter in memory.

    Attributes:
        config: how its prefixes are built.
        backbone: registered name.
        fingerprint: of the model it was made for.
        tensors: {parameter name: tensor}.
        encoder: who made the features that it was trained on; None where it takes none.
        sha256: {file: hash} of what was read.
    """

    config: PrefixConfig | AdapterConfig
    backbone: str
    fingerprint: dict[str, Any]
    tensors: dict[str, Tensor]
    encoder: dict[str, Any] | None = None
    sha256: dict[str, str] = field(default_factory=dict)

    def write(self, directory: str | Path) -> None:
        """Writes ``adapter.safetensors``, ``source.safetensors`` (what makes a context), and ``adapter.json`` last.

        Each appears whole or not at all.

        Raises:
            CheckpointError: if the folder cannot be written.
        """
        import zinit

        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
            description = {
                "format_version": 1 if _is_plain(self.config) else 2,
                "zinit_version": zinit.__version__,
                "backbone": self.backbone,
                "config": _to_dict(self.config),
                "model": self.fingerprint,
                **({} if self.encoder is None else {"encoder": self.encoder}),
                **self._write_tensors(Path(directory)),
                "versions": {"torch": torch.__version__},
            }
            write_atomically(Path(directory) / DESCRIPTION, json.dumps(description, indent=2).encode() + b"\n")
        except OSError as error:
            raise CheckpointError(f"the adapter cannot be written to {directory}: {error}.") from error

    def _write_tensors(self, folder: Path) -> dict[str, str]:
        """The hashes of what was written, for the description."""
        from safetensors.torch import save

        hashes: dict[str, str] = {}
        for file, key in FILES.items():
            own = {k: v for k, v in self.tensors.items() if k.startswith(OF_SOURCE) == (file == SOURCE)}
            if own or file == TENSORS:
                data = save(own, metadata={"format": "pt"})
                write_atomically(folder / file, data)
                hashes[key] = hashlib.sha256(data).hexdigest()
        return hashes

    @classmethod
    def read(cls, source: str | Path, *, revision: str | None = None) -> AdapterFile:
        """Reads a folder, or a Hub repository if there is no such folder.

        Raises:
            CheckpointError: if files are missing or damaged.
        """
        folder = fetch(source, revision=revision)
        for name in (DESCRIPTION, TENSORS):
            if not is_file(folder / name):
                raise CheckpointError(f"{folder} holds no {name}. Expected a folder that zinit saved an adapter to.")
        try:
            description = read_json(folder / DESCRIPTION, CheckpointError, "Save or copy the adapter again.")
            config = _read_config(description, folder)
            backbone, model, encoder = description["backbone"], description["model"], description.get("encoder")
            if not isinstance(backbone, str) or not isinstance(model, dict):
                raise TypeError("backbone must be a name and model its description")
            if not isinstance(encoder, dict | None):
                raise TypeError("encoder must be a description")
            hashes = {file: description[key] for file, key in FILES.items() if file == TENSORS or key in description}
            data = {file: (folder / file).read_bytes() for file in hashes}
        except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
            raise CheckpointError(
                f"{folder / DESCRIPTION} is damaged or unreadable: {what}. Save or copy the adapter again."
            ) from error
        tensors: dict[str, Tensor] = {}
        for file, sha256 in hashes.items():
            tensors |= _read_tensors(folder / file, data[file], sha256)
        return cls(config=config, backbone=backbone, fingerprint=model, tensors=tensors, encoder=encoder, sha256=hashes)

    def check_model(self, model: nn.Module, *, weights: bool = True) -> None:
        """Compares the model with the one the adapter was made for, and the tensors with what it will take.

        Raises:
            CheckpointError: naming the field or the tensor that differs.
        """
        state = state_of(model)
        if state is not None:
            sites = list(state.sites.values())
        else:
            try:
                sites = BACKBONES.get(self.backbone).sites(model)
            except (BackboneError, ConfigError) as error:
                raise CheckpointError(
                    f"this adapter was made for another model: backbone is {self.backbone!r}, and that cannot take "
                    f"{type(model).__name__}: {error}"
                ) from error
        found = fingerprint(model, sites)
        for name, expected in self.fingerprint.items():
            if name in ("key_probe", "name_or_path", "revision"):
                continue
            if found.get(name) != expected:
                raise CheckpointError(
                    f"this adapter was made for another model: {name} is {found.get(name)!r} here, "
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
            modules = build_modules(AdapterConfig.of(self.config), model, sites, device="meta")
        except (BackboneError, ConfigError) as error:
            raise CheckpointError(f"the adapter does not fit: {error}") from error
        check_tensors(self.tensors, {name: tuple(parameter.shape) for name, parameter in modules.named_parameters()})


def _is_plain(config: PrefixConfig | AdapterConfig) -> bool:
    """Whether version 1 of the format can express it: one prefix, with the settings that there were then."""
    if not isinstance(config, PrefixConfig) or config.gate == "query":
        return False
    if config.gating and not config.separate_softmax:
        return False
    return all(getattr(config, name) == old for name, old in SINCE_2.items())


def _to_dict(config: PrefixConfig | AdapterConfig) -> dict[str, Any]:
    if not _is_plain(config):
        return AdapterConfig.of(config).to_dict()
    return {name: value for name, value in config.to_dict().items() if name not in SINCE_2}


def _read_config(description: dict[str, Any], folder: Path) -> PrefixConfig | AdapterConfig:
    version = description["format_version"]
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / DESCRIPTION} has format version {version}; this zinit reads up to {FORMAT_VERSION}. "
            f"Upgrade zinit."
        )
    if version == 1:
        return PrefixConfig.from_dict(description["config"])
    return AdapterConfig.from_dict(description["config"]).simplest()


def _read_tensors(path: Path, data: bytes, sha256: str) -> dict[str, Tensor]:
    from safetensors.torch import load

    if hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointError(
            f"{path} is damaged: it is not the file that {DESCRIPTION} beside it describes "
            f"({len(data):,} bytes). Copy the folder again, or resume the run that made them."
        )
    with parsing(f"{path} is no safetensors file that can be read", CheckpointError, "Save it again."):
        tensors = load(data)
    check_plain(tensors, path)
    return tensors


def fetch(source: str | Path, *, revision: str | None = None) -> Path:
    """The folder of an adapter; that of a Hub repository is downloaded if there is no such folder.

    Raises:
        CheckpointError: if there is none.
    """
    folder = local_path(source)
    return folder if is_folder(folder) else _download(str(source), revision)


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    looks_local = repository.startswith((".", "/", "~")) or repository.count("/") != 1
    if looks_local:
        raise CheckpointError(f"there is no adapter folder {repository}.")
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=[*FILES, DESCRIPTION]))
    except Exception as error:
        raise CheckpointError(
            f"there is no adapter folder {repository}, and the Hub did not give one: {first_line(error)}"
        ) from error
