"""Tasks by name. A new one is one file and one line here.

Outside of zinit: `zinit.register_task`, or an entry point of the group ``zinit.tasks`` (docs/new-task.md).
"""

from zinit.registry import Registry

TASKS = Registry(
    "task",
    {
        "alpaca": "zinit.tasks.alpaca.task:Alpaca",
        "base-to-novel": "zinit.tasks.base_to_novel.task:BaseToNovel",
        "vtab": "zinit.tasks.vtab.task:VTAB",
        "squad": "zinit.tasks.squad.task:Squad",
        "ner": "zinit.tasks.ner.task:TokenClassification",
    },
    group="zinit.tasks",
)
