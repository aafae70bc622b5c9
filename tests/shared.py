"""Where reference data lie that are not in the repository; what needs them is skipped without them."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared"
needs_data = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs the real data in ../shared/data")
