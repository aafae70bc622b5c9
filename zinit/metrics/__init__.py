"""Metrics by name, each an ``evaluate.Metric`` that needs no network. A new one is one file and one line here."""

from __future__ import annotations

from zinit.registry import Entry, Registry

METRICS = Registry(
    "metric",
    {
        "bleu": Entry("zinit.metrics.bleu:Bleu", "BLEU-1 to BLEU-4 of captions, over all images together."),
        "caption_rouge_l": Entry(
            "zinit.metrics.caption_rouge_l:CaptionRougeL", "ROUGE-L of captions, each against several references."
        ),
        "cider_d": Entry(
            "zinit.metrics.cider_d:CiderD", "CIDEr-D of captions: agreement with people's, rare words counting most."
        ),
        "contains": Entry(
            "zinit.metrics.contains:Contains", "How often one of the expected texts is somewhere in the predicted one."
        ),
        "exact_match": Entry(
            "zinit.metrics.exact_match:ExactMatch", "How often the predicted text is exactly the expected one."
        ),
        "final_answer": Entry(
            "zinit.metrics.final_answer:FinalAnswer",
            "How often the final answer to a math problem is the expected one.",
        ),
        "meteor": Entry(
            "zinit.metrics.meteor:Meteor", "METEOR of captions, by its authors' program; needs Java and zinit[meteor]."
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
