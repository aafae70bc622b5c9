"""Adapters on the Hub: folders that are uploaded, with a card that says what they are."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from zinit.adapter.file import AdapterFile
from zinit.errors import CheckpointError, first_line
from zinit.files import is_folder, local_path

CARD = "README.md"
PLACEHOLDER = "THIS_REPOSITORY"
LICENCE = "other"  # the Hub's word for one that it does not know; the user says which


def upload(
    file: AdapterFile,
    repository: str,
    *,
    card: str,
    more: Sequence[Path] = (),
    texts: Mapping[str, str] | None = None,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Uploads an adapter to a repository, which is made if need be. A card that is there already stays.

    Folders of this machine that the model and the encoder lie in are not named there.

    Args:
        file: the adapter.
        repository: "user/name".
        card: text of ``README.md``, where the repository has none; THIS_REPOSITORY in it becomes the repository.
        more: further files; those that are not there are left out.
        texts: further files by their path in the repository.
        private: whether a new repository is; None is the account's own setting.
        token: of the Hub; default: the one that was logged in with.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: if the Hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    shown = replace(file, fingerprint=_for_others(file.fingerprint, "name_or_path"))
    if file.encoder is not None:
        shown = replace(shown, encoder=_for_others(file.encoder, "source"))
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        shown.write(folder)
        try:
            known = api.create_repo(repository, private=private, exist_ok=True).repo_id
            operations = [
                CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=str(path))
                for path in (*sorted(Path(folder).iterdir()), *more)
                if path.is_file()
            ]
            operations += [
                CommitOperationAdd(path_in_repo=path, path_or_fileobj=text.encode())
                for path, text in (texts or {}).items()
            ]
            if not api.file_exists(known, CARD):
                text = card.replace(PLACEHOLDER, known).encode()
                operations.append(CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=text))
            return str(api.create_commit(known, operations, commit_message="Adapter made with zinit").commit_url)
        except Exception as error:  # of the network, of the Hub's answers, of a token that is missing
            raise CheckpointError(
                f"the Hub did not take {repository}: {first_line(error)} Log in with 'hf auth login', or name another "
                f"repository: USER/NAME."
            ) from error


def is_hub_id(model: str | None) -> bool:
    """Whether a model is named as on the Hub, and not by a folder."""
    if not model or model.count("/") > 1 or model.startswith((".", "/", "~")):
        return False
    return not is_folder(local_path(model))


def _for_others(identity: dict[str, Any], where: str) -> dict[str, Any]:
    """A description of a model without the folder that it lies in."""
    return identity if is_hub_id(identity.get(where)) else {**identity, where: None}


def card_of(base: str | None, title: str, body: str, **metadata: Any) -> str:
    """A model card; `upload` puts the repository's name into it.

    Args:
        base: the model that the adapter is of; only a Hub id is a link.
        title: first line.
        body: what follows, in Markdown.
        metadata: further fields of `huggingface_hub.ModelCardData`.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=base if is_hub_id(base) else None,
        library_name="zinit",
        license=LICENCE,
        tags=["llama-adapter", "zero-init-attention", "adapter"],
        **metadata,
    )
    load = f'handle = zinit.from_pretrained("{PLACEHOLDER}")  # the model is handle.model'
    use = f"```python\nimport zinit\n\n{load}\n```"
    licence = "The licence is yours to say: `license`, `license_name` and `license_link` at the top of this file."
    return f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{body}\n\n{use}\n\n{licence}\n"
