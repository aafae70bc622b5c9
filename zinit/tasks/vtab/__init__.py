"""Image classification by VTAB-1k's protocol."""
