"""Tasks by name. A new one is one file and one line here.

Outside of zinit: `zinit.register_task`, or an entry point of the group ``zinit.tasks`` (docs/new-task.md).
"""

from zinit.registry import Entry, Registry

TASKS = Registry(
    "task",
    {
        "alpaca": Entry(
            "zinit.tasks.alpaca.task:Alpaca",
            "Instruction tuning in Alpaca's format: two templates, loss on the response only.",
        ),
        "base-to-novel": Entry(
            "zinit.tasks.base_to_novel.task:BaseToNovel",
            "CLIP's generalisation from base to novel classes, in CoOp's and CoCoOp's protocol.",
        ),
        "vtab": Entry(
            "zinit.tasks.vtab.task:VTAB",
            "Image classification in VTAB-1k's protocol: 1,000 training images, linear head.",
        ),
        "squad": Entry(
            "zinit.tasks.squad.task:Squad",
            "Extractive question answering, SQuAD v1.1 and v2.0, with the official metric.",
        ),
        "ner": Entry(
            "zinit.tasks.ner.task:TokenClassification",
            "Named entity recognition: a tag for every token, CoNLL style, scored by seqeval.",
        ),
    },
    group="zinit.tasks",
)
