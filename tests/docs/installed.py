"""The command line with what ``PYTHONPATH`` names, as a new interpreter finds it: for processes that are forked."""

import os
import sys

from zinit.cli import main

if __name__ == "__main__":
    sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
    sys.argv[0] = "zinit"
    main()
