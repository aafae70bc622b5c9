"""Any other transformers model: asks each attention module's own code how it makes keys and values of hidden states.

A module that uses the attention interface hands its final keys and values to a function looked up by name. So its own
forward, run on the prompts and stopped at that call, *is* its projection, whatever the layout: fused, grouped,
normalised, low-rank. Nothing is guessed from names or shapes. What has to be neutral is position: each prompt is a
sequence of its own, of length one, and rotations that come in as arguments are the identity. Before a model is
accepted every module is tried on random vectors (`zinit.backbones._acceptance`), or refused with the reason.
"""

from __future__ import annotations

import re
import sys

import torch
from torch import nn

from zinit.backbones._acceptance import find_replay, parameters_of
from zinit.backbones._hf import InterfaceSeam
from zinit.backbones._replay import SharesKV
from zinit.backbones._rows import rows_of
from zinit.backbones._view import NEXT_STEP, attention_home
from zinit.backbones.base import AttentionSite, with_real_weights
from zinit.errors import BackboneError

CROSS = re.compile(r"cross|enc_?dec|encoder_attn|perceiver", re.IGNORECASE)
FOREIGN = re.compile(
    r"^(key_value|encoder_hidden|cross_att|context|latents|(keys?|values?|k|v|kv)(_|$))", re.IGNORECASE
)
ADDED = re.compile(r"(key|value)s?_(?!value|states|hidden)", re.IGNORECASE)  # to keys or values, from elsewhere
NOT_REPRODUCED = {"reorder_and_upcast_attn": "it computes eager attention itself, past the interface"}


class Discovered(InterfaceSeam):
    """The registry's last entry: whatever uses the attention interface."""

    name, default_task, demo_model = "transformers", "alpaca", ""

    def matches(self, model: nn.Module) -> bool:
        """Whether it is a transformers model, or a part of one that attends."""
        home = sys.modules.get("transformers.modeling_utils")
        if home is None:
            return False
        return isinstance(model, home.PreTrainedModel) or any(on_interface(module) for module in model.modules())

    def sites(self, model: nn.Module) -> list[AttentionSite]:
        """The self-attention modules that use the interface and project keys and values, lowest layer first.

        Raises:
            BackboneError: if there are none, or one of them makes its keys and values in a way that prompts cannot
                follow; the message says which and why.
        """
        left_out: list[str] = []
        found: list[AttentionSite] = []
        for name, module in model.named_modules():
            if "zinit" in name.split(".") or not on_interface(module):
                continue
            if reason := attends_elsewhere(model, name, module):
                left_out.append(f"{name} ({reason})")
                continue
            try:
                found.append(site_of(model, name, module))
            except SharesKV:
                left_out.append(f"{name} (it has no keys and values of its own: an earlier layer's serve it)")
        if not found:
            without = "has no attention on transformers' attention interface"
            if left_out:
                without = f"has no self-attention that zinit can tell to be one: {left_out[0]}"
            raise BackboneError(f"{type(model).__name__} {without}. {NEXT_STEP}")
        return found


TRANSFORMERS = Discovered()


def on_interface(module: nn.Module) -> bool:
    """Whether the module looks its attention function up in the interface."""
    if not hasattr(module, "config"):
        return False
    try:
        attention_home(type(module))
    except BackboneError:
        return False
    return True


def says_cross(name: str, module: nn.Module) -> str:
    """Why a module is cross-attention by what it is called or says of itself; empty if it is not."""
    parent, _, own = name.rpartition(".")
    if CROSS.search(own) or CROSS.search(type(module).__name__):
        return "cross-attention by its name"
    if CROSS.search(parent.rpartition(".")[2]):
        return "cross-attention by its parent's name"
    return "cross-attention by its own word" if getattr(module, "is_cross_attention", False) else ""


def attends_elsewhere(model: nn.Module, name: str, module: nn.Module) -> str:
    """Why a module is taken for cross-attention and left as it is; empty if it is self-attention.

    A class that serves both ways (BART's, say) is self-attention where its name says so, or where nothing else in its
    layer could be.
    """
    if reason := says_cross(name, module):
        return reason
    foreign = [p for p in parameters_of(module) if FOREIGN.search(p.name)]
    required = [p.name for p in foreign if p.default is p.empty]
    if required:
        return f"its forward needs {', '.join(required)} from elsewhere"
    parent, _, own = name.rpartition(".")
    if foreign and "self" not in own.lower():
        for sibling_name, sibling in model.get_submodule(parent).named_modules(prefix=parent):
            if sibling is not module and on_interface(sibling) and not says_cross(sibling_name, sibling):
                return f"its forward takes {foreign[0].name}, and {sibling_name} may be the self-attention beside it"
    return ""


@torch.no_grad()
def site_of(model: nn.Module, name: str, module: nn.Module) -> AttentionSite:
    """Finds how to replay a module, and checks it.

    Raises:
        BackboneError: if that cannot be done; the message says why.
        SharesKV: if it takes the keys and values that an earlier layer made.
    """
    what = f"{name} ({type(module).__name__})"
    part = "Attach to a part of the model that does without it, or describe the model in a short file and register it."
    for option, reason in NOT_REPRODUCED.items():
        if getattr(module, option, False):
            raise BackboneError(f"{what} cannot take a prefix with {option}=True: {reason}. Set it to False.")
    for parameter in parameters_of(module):
        if ADDED.match(parameter.name):
            raise BackboneError(f"{what} cannot take a prefix: its forward takes {parameter.name} besides. {part}")
    host = with_real_weights(module)
    with torch.autocast(next(iter(host.parameters())).device.type, enabled=False):
        replay, handed, problem = find_replay(host)
    if replay is None:
        raise BackboneError(f"{what} cannot take a prefix: {problem}. {part}")
    query, key, value = handed
    return AttentionSite(
        name=name,
        module=module,
        width=replay.width,
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        head_dim=key.shape[-1],
        value_dim=value.shape[-1],
        project_kv=replay,
        rows=rows_of(model, name, module),
    )
