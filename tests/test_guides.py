"""The guides, run as a reader would: their files written to a folder, the rest typed into Python, in order."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import zinit
from tests.tiny import ROOT
from zinit.backbones import BACKBONES
from zinit.backbones.check import check_backbone
from zinit.errors import BackboneError
from zinit.methods import METHODS
from zinit.tasks import TASKS


@dataclass
class Guide:
    """A document's code.

    Attributes:
        text: all of it.
        files: {name in a block's first line: the block}.
        typed: the Python blocks without a name.
        commands: lines of the shell blocks.
        names: what the typed blocks have defined.
        printed: what they have printed, and what the text says that they print.
    """

    text: str
    files: dict[str, str] = field(default_factory=dict)
    typed: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    printed: list[tuple[str, str]] = field(default_factory=list)

    def type(self, code: str) -> None:
        """Runs a block; every ``print(...)  # text`` in it must print that."""
        claims = re.findall(r"^\s*print\(.*\)  # ([^:\n]+)", code, re.MULTILINE)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, "the guide", "exec"), self.names)
        lines = out.getvalue().splitlines()
        assert len(lines) == len(claims), (lines, claims)
        self.printed += zip(lines, claims, strict=True)


def read(name: str) -> Guide:
    guide = Guide((ROOT / "docs" / name).read_text())
    for language, code in re.findall(r"^```(\w+)\n(.*?)^```$", guide.text, re.MULTILINE | re.DOTALL):
        named = re.match(r"# (\S+\.\w+)\n", code)
        if named:
            assert named[1] not in guide.files
            guide.files[named[1]] = code
        elif language == "python":
            guide.typed.append(code)
        else:
            guide.commands += code.splitlines()
    return guide


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A reader's empty folder; what is registered and imported there is forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for registry in (BACKBONES, TASKS, METHODS):
        monkeypatch.setattr(registry, "_where", dict(registry._all()))
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize("name", ["new-backbone.md", "new-task.md"])
def test_the_guides_are_short(name: str) -> None:
    lines = (ROOT / "docs" / name).read_text().splitlines()
    assert len(lines) < 200
    assert max(map(len, lines)) <= 130


# --- a backbone -------------------------------------------------------------------------------------------------------


@pytest.fixture
def backbone(folder: Path) -> Guide:
    guide = read("new-backbone.md")
    for name, code in guide.files.items():
        (folder / name).write_text(code)
    for code in guide.typed:
        guide.type(code)
    return guide


def test_the_backbone_guide_runs_and_prints_what_it_says(backbone: Guide) -> None:
    assert len(backbone.printed) == 5
    assert [said for said, _ in backbone.printed] == [claimed for _, claimed in backbone.printed]


def test_the_adapter_has_fewer_than_25_lines(backbone: Guide) -> None:
    lines = [line for line in backbone.files["my_backbone.py"].splitlines() if line.strip() and line[0] != "#"]
    assert lines[0].startswith("from tiny_decoder")
    assert len(lines) < 25


def test_a_saved_adapter_comes_back(backbone: Guide) -> None:
    model, x = backbone.names["model"], torch.randn(2, 6, 32)
    handle = zinit.attach(model, zinit.PrefixConfig(length=3), seed=1)
    for prefix in handle.prefixes.values():
        prefix.gate.data.fill_(0.3)
    learned = model(x)
    handle.save("again")
    handle.detach()
    zinit.load(model, "again")
    assert torch.equal(model(x), learned)


def test_plain_prefix_tuning_is_refused_or_right(backbone: Guide) -> None:
    model, x = backbone.names["model"], torch.randn(2, 6, 32)
    split, rotate = backbone.names["split"], backbone.names["rotate"]
    tuning = zinit.PrefixConfig(length=3, layers=1, gating=False, separate_softmax=False)
    handle = zinit.attach(model, tuning, seed=0)
    with pytest.raises(BackboneError, match="does not support plain prefix tuning"):
        model(x)
    handle.detach()
    zinit.register_backbone("both", "my_backbone_both:MINE")
    assert check_backbone(model, x, backbone="both") == 3
    handle = zinit.attach(model, tuning, seed=0, backbone="both")
    layer = model.layers[2]
    tokens = handle.prefixes["layers.2"].prompt()[None].expand(2, -1, -1)
    with handle.disabled(), torch.no_grad():
        x = model.layers[:2](x)
        query = rotate(split(layer.query(x)))
        key = torch.cat([split(layer.key(tokens)), rotate(split(layer.key(x)))], dim=2).repeat_interleave(2, dim=1)
        value = torch.cat([split(layer.value(tokens)), split(layer.value(x))], dim=2).repeat_interleave(2, dim=1)
        seen = torch.cat([torch.ones(6, 3), torch.ones(6, 6).tril()], dim=1).bool()
        weights = (query @ key.mT * 8**-0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        expected = x + layer.out((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected)


def test_the_other_methods_run_on_the_backbone(backbone: Guide) -> None:
    for name in ("lora", "bitfit", "bottleneck", "full"):
        model = backbone.names["Decoder"]()
        method = METHODS.get(name)(METHODS.get(name).Config())
        adapted = method.apply(model, prefix=zinit.PrefixConfig(), backbone="mine", seed=0)
        adapted.model(torch.randn(2, 6, 32)).sum().backward()
        changed = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
        assert changed
        if name == "lora":
            assert {part.split(".")[2] for part in changed} == {"query", "value"}


BROKEN = {
    "a closed gate must change no bit": ("return out + prefix", "return out + 1e-3 + prefix"),
    "open gates must change the output": ("return out + prefix", "return out + 0 * prefix"),
    "gets no gradient": ("*slot.keys_values(", "*(x.detach() for x in slot.keys_values("),
    "a prefix computed ahead must do the same": ("8**-0.5)", "8**-0.5) * (2 if slot.frozen else 1)"),
    "a disabled adapter must change no bit": ("    return out\n", "    return out if slot.active else 2 * out\n"),
    "detaching must give the model's own output": (", site.module.attend", "\n        site.module.attend = lambda q, k, v: q"),
    "detaching must leave the model's own parts only": ("del site.module.zinit, ", "del "),
}


@pytest.mark.parametrize("promise", BROKEN)
def test_the_check_finds_what_is_broken(backbone: Guide, folder: Path, promise: str) -> None:
    old, new = BROKEN[promise]
    code = backbone.files["my_backbone.py"]
    assert code.count(old) == 1
    code = code.replace(old, new)
    if "detach()" in new:
        code = code.replace("query.dtype), 8**-0.5", "query.dtype)), 8**-0.5")
    (folder / "broken.py").write_text(code)
    zinit.register_backbone("broken", "broken:MINE")
    with pytest.raises(BackboneError, match=f"'mine' on Decoder: .*{promise}"):
        check_backbone(backbone.names["Decoder"](), torch.randn(2, 6, 32), backbone="broken")
