"""Where reference data lie that are not in the repository; what needs them is skipped without them."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
needs_data = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs the real data in ../shared/data")
