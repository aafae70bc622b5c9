"""The command line with small files of stored states; see `test_trunk_cache`."""

from __future__ import annotations

from zinit import trunk
from zinit.cli import main

trunk.PART_BYTES = 10_000

if __name__ == "__main__":
    main()
