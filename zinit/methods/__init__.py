"""Ways to adapt a model, by name: zero-init attention and what it is compared with. A new one is a file and a line.

Outside of zinit: `zinit.register_method`, or an entry point of the group ``zinit.methods``.
"""

from zinit.registry import Registry

METHODS = Registry(
    "method",
    {
        "zero-init": "zinit.methods.prefix:ZeroInit",
        "random-gate": "zinit.methods.prefix:RandomGate",
        "prefix-tuning": "zinit.methods.prefix:PrefixTuning",
        "full": "zinit.methods.weights:Full",
        "head-only": "zinit.methods.weights:HeadOnly",
        "bitfit": "zinit.methods.weights:BitFit",
        "lora": "zinit.methods.lora:Lora",
        "prompt-tuning": "zinit.methods.prompt_tuning:PromptTuning",
        "bottleneck": "zinit.methods.bottleneck:Bottleneck",
        "logistic-regression": "zinit.methods.logistic_regression:LogisticRegression",
    },
    group="zinit.methods",
)
