"""The training loop and what it stands on: plan, checkpoints, strategies."""
