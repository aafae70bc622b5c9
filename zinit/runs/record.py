"""What a run says about itself."""

from __future__ import annotations

import platform
from importlib import metadata

PACKAGES = ("torch", "transformers", "timm", "accelerate", "datasets", "evaluate", "safetensors")


def versions() -> dict[str, str]:
    """Python and the libraries a result depends on."""
    import zinit

    return {
        "zinit": zinit.__version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
    }
