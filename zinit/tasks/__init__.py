"""Tasks by name. A new one is one file and one line here.

Outside of zinit: `zinit.register_task`, or an entry point of the group ``zinit.tasks`` (docs/new-task.md).
"""

from zinit.registry import Address, Entry, Registry

TASKS = Registry(
    "task",
    {
        "alpaca": Entry(
            "zinit.tasks.alpaca.task:Alpaca",
            "Instruction tuning in Alpaca's format: two templates, loss on the response only.",
            facts={"Config": Address("zinit.tasks.alpaca.config:AlpacaConfig")},
        ),
        "base-to-novel": Entry(
            "zinit.tasks.base_to_novel.task:BaseToNovel",
            "CLIP's generalisation from base to novel classes, in CoOp's and CoCoOp's protocol.",
            facts={"Config": Address("zinit.tasks.base_to_novel.config:BaseToNovelConfig")},
        ),
        "caption": Entry(
            "zinit.tasks.caption.task:Caption",
            "Captions of images, such as COCO's in Karpathy's split: BLEU, ROUGE-L and CIDEr-D.",
            facts={"Config": Address("zinit.tasks.caption.config:CaptionConfig")},
        ),
        "math": Entry(
            "zinit.tasks.math.task:Math",
            "Math word problems, such as MetaMathQA's and GSM8K's, scored by the final answer.",
            facts={"Config": Address("zinit.tasks.math.config:MathConfig")},
        ),
        "science-qa": Entry(
            "zinit.tasks.science_qa.task:ScienceQA",
            "Multiple-choice questions of ScienceQA, some with an image, scored in its nine categories.",
            facts={"Config": Address("zinit.tasks.science_qa.config:ScienceQAConfig")},
        ),
        "conversation": Entry(
            "zinit.tasks.conversation.task:ConversationTask",
            "Conversations of several turns, in a chat template: loss on every answer of the assistant.",
            facts={"Config": Address("zinit.tasks.conversation.config:ConversationConfig")},
        ),
        "vtab": Entry(
            "zinit.tasks.vtab.task:VTAB",
            "Image classification in VTAB-1k's protocol: 1,000 training images, linear head.",
            facts={"Config": Address("zinit.tasks.vtab.config:VTABConfig")},
        ),
        "squad": Entry(
            "zinit.tasks.squad.task:Squad",
            "Extractive question answering, SQuAD v1.1 and v2.0, with the official metric.",
            facts={"Config": Address("zinit.tasks.squad.config:SquadConfig")},
        ),
        "joint": Entry(
            "zinit.tasks.joint.task:Joint",
            "A task with images and one of texts in every step, each with its own parameters (V2, 3.3).",
            facts={"Config": Address("zinit.tasks.joint.config:JointConfig")},
        ),
        "ner": Entry(
            "zinit.tasks.ner.task:TokenClassification",
            "Named entity recognition: a tag for every token, CoNLL style, scored by seqeval.",
            facts={"Config": Address("zinit.tasks.ner.config:TokenClassificationConfig")},
        ),
    },
    group="zinit.tasks",
)
