"""`import zinit` is instant: heavy packages are imported when first needed. And the check itself can fail."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.integration

HEAVY = ("torch", "transformers", "timm", "accelerate", "datasets", "safetensors", "huggingface_hub", "numpy")


def imported_by(code: str) -> set[str]:
    """The heavy packages that a fresh interpreter has loaded after running ``code``."""
    report = f"{code}\nimport sys\nprint('loaded:', *[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("loaded:")[2].split())


@pytest.mark.parametrize(
    "code",
    [
        "import zinit",
        "import zinit; zinit.PrefixConfig(length=5); zinit.PrefixConfig.from_dict({})",
        "import zinit; zinit.ConfigError, zinit.BackboneError, zinit.CheckpointError, zinit.ZinitError",
        "import zinit; zinit.__version__",
        "from zinit.registry import Registry; Registry('x', {'a': 'torch:nn'}).where('a')",
        "import zinit; zinit.register_backbone('mine', 'torch:nn')",
        "from zinit.backbones import BACKBONES; list(BACKBONES); 'llama' in BACKBONES",
        "import zinit; zinit.register_task('mine', 'torch:nn')",
        "import zinit; zinit.register_method('mine', 'torch:nn')",
        "import sys, zinit.cli\nsys.argv = ['zinit', '--version']\n"
        "try: zinit.cli.main()\nexcept SystemExit as end: assert not end.code",
        "from zinit.ui.listing import list_kind\n"
        "for kind in ('backbones', 'tasks', 'methods', 'metrics', 'formats', 'presets', 'benchmarks'):\n"
        "    assert list_kind(kind)",
        "import sys, zinit.cli\n"
        "for wrong in ('--backbone lama', '--backbone llama --task alpacca', '--backbone llama --preset alpaca/lama',\n"
        "              '--backbone llama --preset lama', '--backbone llama -o prefix.lenth=3',\n"
        "              '--backbone llama -o prefix.length=x', '--backbone vit -o task.split=train9',\n"
        "              '--backbone clip -o method=lora -o method.rank=0', '--backbone roberta -o seed=-1'):\n"
        "    sys.argv = ['zinit', 'train', *wrong.split(), '--output', 'nowhere']\n"
        "    try: zinit.cli.main()\n"
        "    except SystemExit as end: assert end.code == 2, wrong\n"
        "    else: raise SystemExit(f'not refused: {wrong}')",
        "import contextlib, io, sys, zinit.cli\n"
        "for wrong in ('eval nowhere', 'chat nowhere', 'generate nowhere --prompt x', 'eval .', 'chat tests',\n"
        "              'train --resume --output nowhere', 'inspect ./nowhere', 'inspect tests'):\n"
        "    sys.argv = ['zinit', *wrong.split()]\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as said:\n"
        "        try: zinit.cli.main()\n"
        "        except SystemExit as end: assert end.code == 2, wrong\n"
        "        else: raise SystemExit(f'not refused: {wrong}')\n"
        "    assert ' holds no ' in said.getvalue() or 'there is no model folder' in said.getvalue(), said.getvalue()",
    ],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    assert imported_by(code) == set()


def test_attach_needs_torch_only() -> None:
    """A model that is no transformers model can be refused without importing transformers."""
    code = """
import torch, zinit
try:
    zinit.attach(torch.nn.Linear(2, 2))
except zinit.BackboneError as error:
    assert "Linear" in str(error)
else:
    raise SystemExit("not refused")
"""
    assert imported_by(code) <= {"torch", "numpy"}


def test_the_formula_needs_torch_only() -> None:
    assert imported_by("import zinit; zinit.ZeroGatedPrefix; zinit.AttentionSite") <= {"torch", "numpy"}


def test_this_check_can_fail() -> None:
    assert imported_by("import json") == set()
    assert "torch" in imported_by("import zinit; zinit.ZeroGatedPrefix")
    assert "safetensors" in imported_by("import safetensors")
    with pytest.raises(AssertionError, match="ModuleNotFoundError"):
        imported_by("import no_such_module")


def test_every_public_name_resolves_and_is_listed() -> None:
    import zinit

    for name in zinit.__all__:
        assert getattr(zinit, name) is not None
    assert set(zinit._WHERE) <= set(zinit.__all__)
    with pytest.raises(AttributeError, match="no attribute 'attahc'"):
        zinit.attahc  # pyright: ignore[reportAttributeAccessIssue]
