"""Multiple-choice questions of ScienceQA, with and without images."""
