"""Other implementations' checkpoint formats: reading, writing, converting."""
