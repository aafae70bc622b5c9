"""docs/backbones.md: what its script takes from its log, and what others say of the table."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from scripts import make_backbones
from tests.shared import ROOT


def test_results_of_other_versions_are_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, now, result = tmp_path / "log", make_backbones.versions(), {"status": "refused", "reason": "x"}
    lines = [
        ["transformers", "a", result, now],
        ["transformers", "b", result, "transformers 4.0"],
        ["timm", "c", result],
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    work = [("transformers", "a"), ("transformers", "b"), ("timm", "c")]
    assert make_backbones.read_log(log, work) == {("transformers", "a"): result}
    said = capsys.readouterr().out
    assert f"1 results are of transformers 4.0, and installed are {now}: run again" in said
    assert "1 results are of versions that are not noted" in said
    assert make_backbones.read_log(tmp_path / "none", work) == {}


def test_the_readme_counts_what_the_table_lists() -> None:
    page = (ROOT / "docs" / "backbones.md").read_text()
    version = re.findall(r"transformers (\d+\.\d+)\.\S+, timm ", page)
    supported = re.findall(r"^\| supported \| (\d+) \|$", page, re.MULTILINE)
    assert len(version) == 1
    assert len(supported) == 2
    for count, title in zip(supported, ("transformers", "timm"), strict=True):
        table = page.partition(f"### Supported ({title})")[2].partition("\n#")[0]
        assert len(re.findall(r"^\| [^|]+ \| `", table, re.MULTILINE)) == int(count)
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert (
        f"the {supported[0]} families of transformers {version[0]} and {supported[1]} kinds of timm attention" in readme
    )


def test_what_takes_too_long_is_untried_and_what_waits_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def trial(name: str) -> dict[str, Any]:
        while name == "busy":
            pass
        time.sleep(1.5)
        return {"class": name}

    monkeypatch.setattr(make_backbones, "TIMEOUT", 1)
    monkeypatch.setattr(make_backbones, "try_transformers", trial)
    found = make_backbones.run_all([("transformers", "busy"), ("transformers", "waiting")], 2, None)
    assert found["transformers", "busy"] == {"status": "not built", "reason": "it takes more than 1 s"}
    assert found["transformers", "waiting"] == {"status": "supported", "class": "waiting"}
