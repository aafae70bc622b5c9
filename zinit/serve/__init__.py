"""Serving: a batch over many adapters (engine), OpenAI's API over it (http), and the command that starts both.

The engine knows nothing of HTTP, and the HTTP side nothing of torch: both speak `zinit.serve.requests`.
"""
