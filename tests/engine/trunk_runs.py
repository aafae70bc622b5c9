"""The command line with small files of stored states; see `test_trunk_cache`."""

from __future__ import annotations

from zinit import rows
from zinit.cli import main

rows.PART_BYTES = 10_000

if __name__ == "__main__":
    main()
