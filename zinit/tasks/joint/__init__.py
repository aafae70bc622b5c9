"""Two tasks on one model: images and language, each with its own parameters."""
