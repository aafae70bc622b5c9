from __future__ import annotations

import pytest

from tests.contract.cases import CASES, Case


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    """Every tiny model of every backbone."""
    return request.param


@pytest.fixture(params=[case for case in CASES if case.generates], ids=str)
def generator(request: pytest.FixtureRequest) -> Case:
    """Those that have ``generate``."""
    return request.param


LEADERS = list({case.backbone: case for case in reversed(CASES)}.values())


@pytest.fixture(params=LEADERS, ids=str)
def leader(request: pytest.FixtureRequest) -> Case:
    """The first of each backbone, for what is slow and does not depend on sizes."""
    return request.param
