"""What the processes of tests have imported before they are forked; see `tests.processes`."""

from unittest.mock import MagicMock

import accelerate
import datasets
import timm
import torch
import transformers
from torch.distributed import fsdp

import zinit.cli
import zinit.demo
import zinit.runs.evaluate
import zinit.runs.report
import zinit.runs.settings
import zinit.runs.train
import zinit.tasks.alpaca.task
from zinit.models.loading import load_causal_lm
from zinit.runs import plots

torch.set_num_threads(1)
plots.figure = lambda *size, **how: (MagicMock(), MagicMock())
plots.svg = lambda figure, label: ""  # matplotlib takes longer than a tiny run; drawn where pages are tested
KEPT = (
    accelerate,
    datasets,
    timm,
    fsdp,
    transformers.LlamaForCausalLM,
    transformers.AutoTokenizer,
    load_causal_lm,
    zinit,
)
