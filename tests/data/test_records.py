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
