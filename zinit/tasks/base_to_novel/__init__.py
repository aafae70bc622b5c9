"""Base-to-novel generalization of a dual encoder."""
