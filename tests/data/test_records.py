"""Records from files and from the Hub, whatever is in them."""

from __future__ import annotations

import datasets
import pytest

from zinit.data.records import read_document
from zinit.errors import DataError


@pytest.mark.parametrize("name", ["json", "csv", "text", "imagefolder", "json:train[:3]"])
def test_a_kind_of_file_is_no_data_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` has builders of these names, which would read the folder at hand and write into its cache."""
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the builder was run"))
    with pytest.raises(DataError, match=rf"'{name.partition(':')[0]}' is a kind of file, .* Name the data file itself"):
        read_document(name)


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("some/set", ("some/set", None, "train")),
        ("some/set:test", ("some/set", None, "test")),
        ("some/set:train[:100]", ("some/set", None, "train[:100]")),
        ("some/set:main:test", ("some/set", "main", "test")),
        ("some/set:main:train[:9]", ("some/set", "main", "train[:9]")),
        ("some/set:main:", ("some/set", "main", "train")),
    ],
)
def test_the_hub_is_asked_for_configuration_and_split(
    source: str, asked: tuple[str, str | None, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(path: str, name: str | None = None, split: str | None = None) -> list[tuple[str, str | None, str | None]]:
        return [(path, name, split)]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_document(source) == ([asked], source)


def test_a_missing_configuration_says_how_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"Config name is missing\. Name them: some/set:CONFIGURATION:SPLIT"):
        read_document("some/set")
