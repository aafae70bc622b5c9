"""Instruction tuning in Alpaca's format."""
