"""Adapters on the Hub: folders that are uploaded, with a card that says what they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zinit.errors import CheckpointError, first_line

CARD = "README.md"
LICENCE = "other"  # the Hub's word for one that it does not know; the user says which


def upload(
    folder: str | Path,
    repository: str,
    files: Sequence[str],
    *,
    card: str,
    private: bool | None = None,
    token: str | None = None,
    message: str = "Adapter made with zinit",
) -> str:
    """Uploads files of a folder to a repository, which is made if need be. A card that is there already stays.

    Args:
        folder: holds the files.
        repository: "user/name".
        files: names; those that are not there are left out.
        card: text of ``README.md``, where the repository has none.
        private: whether a new repository is; None is the account's own setting.
        token: of the Hub; default: the one that was logged in with.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: if the Hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    try:
        known = api.create_repo(repository, private=private, exist_ok=True).repo_id
        operations = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(Path(folder) / name))
            for name in files
            if (Path(folder) / name).is_file()
        ]
        if not api.file_exists(known, CARD):
            operations.append(CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=card.encode()))
        return str(api.create_commit(known, operations, commit_message=message).commit_url)
    except Exception as error:  # of the network, of the Hub's answers, of a token that is missing
        raise CheckpointError(
            f"the Hub did not take {repository}: {first_line(error)} Log in with 'hf auth login', or name another "
            f"repository: USER/NAME."
        ) from error


def card_of(base: str | None, title: str, body: str, **metadata: Any) -> str:
    """A model card.

    Args:
        base: the model that the adapter is of; only a Hub id is a link.
        title: first line.
        body: what follows, in Markdown.
        metadata: further fields of `huggingface_hub.ModelCardData`.
    """
    from huggingface_hub import ModelCardData

    is_id = base is not None and base.count("/") == 1 and not base.startswith((".", "/", "~"))
    data = ModelCardData(
        base_model=base if is_id else None,
        library_name="zinit",
        license=LICENCE,
        tags=["llama-adapter", "zero-init-attention", "adapter"],
        **metadata,
    )
    load = 'handle = zinit.from_pretrained("THIS_REPOSITORY")  # the model is handle.model'
    use = f"```python\nimport zinit\n\n{load}\n```"
    licence = "The licence is yours to say: `license`, `license_name` and `license_link` at the top of this file."
    return f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{body}\n\n{use}\n\n{licence}\n"
