"""The script that makes docs/backbones.md: what it takes from its log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import make_backbones


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
