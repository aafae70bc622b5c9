"""``python -m zinit``, which is what ``torchrun -m zinit`` and ``accelerate launch -m zinit`` run."""

from zinit.cli import main

main()
