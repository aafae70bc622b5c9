"""Settings that a method begins with, under presets, files and options; nothing heavy is imported with them.

P1: the LLaMA-Adapter paper (ICLR 2024); P2: the V2 paper (arXiv 2304.15010); IB: ImageBind-LLM's (arXiv 2309.03905);
C: the released code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Tables = Mapping[str, Mapping[str, Any]]

NONE: Tables = {}
NO_DEMOS: Mapping[str, str] = {}
FLAGS = {"llama": "conversation/flags"}  # the preset of a method's own demo, by backbone
FLAGS_BIND = {"llama": "conversation/flags-bind"}
V1_MULTIMODAL: Tables = {
    "prefix": {"prompt": "table+context"},  # P1, Eq. 10
    "context": {"name": "projected-image"},  # P1, Eq. 9
}
TUNED: Tables = {"tuning": {"scale": "output"}}  # P2, section 3.1: y = s (W x + b), and all norms
V2: Tables = {
    "parts": {
        "early": {"length": 20, "layers": [0], "prompt": "context"},  # P2, section 3.2: the first layer, 20 tokens
        "late": {"length": 20},  # P2: all other layers, 31 of 32
    },
    "context": {"name": "visual-tokens"},
    "tuning": {"scale": "output"},  # P2, section 3.1: y = s (W x + b), and all norms
}
V2_LATE: Tables = {
    "prefix": {"prompt": "table+context"},  # C: visual tokens are added to the prompts
    "context": {"name": "visual-tokens"},
    "tuning": {"scale": "none"},  # C: biases and norms
}
IMAGEBIND_LLM: Tables = {
    "prefix": {"length": 1, "prompt": "table+context"},  # C: one prompt in every layer; IB has no table
    "context": {"name": "bind"},  # IB, section 3.1
    "tuning": {"scale": "none", "lora_rank": 16},  # C: LoRA, biases and norms
}
HYPER_PROMPTS: Tables = {"prefix": {"prompts": "hyper"}}
QUERY_GATE: Tables = {"prefix": {"gate": "query"}}
