"""What turns images into features: over transformers and timm, nothing of theirs copied."""
