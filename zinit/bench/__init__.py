"""The generalization benchmark: backbones x tasks x methods x seeds, resumable, with tables and plots."""
