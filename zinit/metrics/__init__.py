"""Metrics by name, each an ``evaluate.Metric`` that needs no network. A new one is one file and one line here."""

from __future__ import annotations

from zinit.registry import Registry

METRICS = Registry(
    "metric",
    {
        "exact_match": "zinit.metrics.exact_match:ExactMatch",
        "rouge_l": "zinit.metrics.rouge_l:RougeL",
        "squad": "zinit.metrics.squad:Squad",
        "squad_v2": "zinit.metrics.squad:SquadV2",
    },
)
