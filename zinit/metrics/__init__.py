"""Metrics by name, each an ``evaluate.Metric`` that needs no network. A new one is one file and one line here."""

from __future__ import annotations

from zinit.registry import Entry, Registry

METRICS = Registry(
    "metric",
    {
        "exact_match": Entry(
            "zinit.metrics.exact_match:ExactMatch", "How often the predicted text is exactly the expected one."
        ),
        "rouge_l": Entry(
            "zinit.metrics.rouge_l:RougeL",
            "ROUGE-L: how much of the expected text the predicted one holds, in the same order.",
        ),
        "squad": Entry(
            "zinit.metrics.squad:Squad",
            "SQuAD v1.1's exact match and F1, digit for digit those of the official script.",
        ),
        "squad_v2": Entry(
            "zinit.metrics.squad:SquadV2", "SQuAD v2.0's exact match and F1, questions without an answer included."
        ),
    },
)
