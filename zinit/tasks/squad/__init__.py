"""Extractive question answering in SQuAD's format."""
