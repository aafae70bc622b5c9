"""A bounded run of every fuzz target, and that the fuzzer sees what it looks for."""

from __future__ import annotations

import time
from pathlib import Path
from random import Random

import pytest

from tests.fuzz import run
from tests.fuzz.run import fuzz, try_one
from tests.fuzz.targets import TARGETS, Call
from zinit.errors import DataError

INPUTS = 150
KNOWN: dict[str, str] = {}  # a line goes when its fault is fixed: strict, so that it is noticed
NEVER_WRONG = ("shown-text",)  # whatever is shown is made harmless
CASES = [
    pytest.param(name, marks=pytest.mark.xfail(reason=KNOWN[name], strict=True) if name in KNOWN else ())
    for name in TARGETS
]


@pytest.mark.slow
@pytest.mark.parametrize("target", CASES)
def test_wrong_input_works_or_is_refused(target: str) -> None:
    report = fuzz(target, seed=0, inputs=INPUTS)
    assert not report.findings, str(report)
    assert report.tried == INPUTS
    if target in NEVER_WRONG:
        assert report.refused == 0
    else:
        assert 0 < report.refused < INPUTS  # else the inputs are all alike, or one part of them is never wrong


def plant(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    def target(rng: Random, folder: Path) -> Call:
        return call

    monkeypatch.setitem(TARGETS, "planted", target)


def test_a_refusal_is_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise DataError("no")

    plant(monkeypatch, refuse)
    report = fuzz("planted", seed=0, inputs=5)
    assert (report.tried, report.refused, report.findings) == (5, 5, {})


def test_an_error_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise KeyError("layers")

    plant(monkeypatch, fail)
    report = fuzz("planted", seed=0, inputs=5)
    assert list(report.findings.values()) == [(0, "KeyError: 'layers'")]
    assert "--only 0: KeyError" in str(report)


def test_a_hang_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang() -> None:
        while True:
            try:
                time.sleep(0.05)
            except Exception:  # the limit must get through
                continue

    plant(monkeypatch, hang)
    monkeypatch.setattr(run, "LIMIT", 1)
    report = fuzz("planted", seed=0, inputs=1)
    assert [error for _, error in report.findings.values()] == ["HangError: more than 1 s"]


def test_an_input_depends_on_seed_and_number_alone(tmp_path: Path) -> None:
    made = []
    for _ in range(2):
        TARGETS["image"](Random("image 0 7"), tmp_path)
        made.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
    assert made[0] == made[1]
    assert try_one("image", 0, 7) in ("worked", "refused")
