"""Ways to adapt a model, by name: zero-init attention and what it is compared with. A new one is a file and a line.

Outside of zinit: `zinit.register_method`, or an entry point of the group ``zinit.methods``.
"""

from zinit.registry import Entry, Registry

METHODS = Registry(
    "method",
    {
        "zero-init": Entry(
            "zinit.methods.prefix:ZeroInit",
            "Zero-init attention: gated prompts in every layer, with the settings of [prefix].",
        ),
        "random-gate": Entry(
            "zinit.methods.prefix:RandomGate",
            "The same prompts with gates that start at N(0, 1), the paper's ablation of zero-init.",
        ),
        "prefix-tuning": Entry(
            "zinit.methods.prefix:PrefixTuning",
            "Plain prefix tuning: the same prompts without a gate, in one softmax with the words.",
        ),
        "full": Entry("zinit.methods.weights:Full", "Full fine-tuning: every weight, and the head."),
        "head-only": Entry(
            "zinit.methods.weights:HeadOnly",
            "The task's head on the frozen model (linear probing by gradient descent).",
        ),
        "bitfit": Entry(
            "zinit.methods.weights:BitFit", "BitFit (Ben Zaken et al., ACL 2022): the bias terms, and the head."
        ),
        "lora": Entry(
            "zinit.methods.lora:Lora",
            "Low-rank updates of the query and value projections, or of the fused projection.",
        ),
        "prompt-tuning": Entry(
            "zinit.methods.prompt_tuning:PromptTuning",
            "Learned embeddings before the first layer only; for models that read one sequence.",
        ),
        "bottleneck": Entry(
            "zinit.methods.bottleneck:Bottleneck",
            "A bottleneck adapter after each attention (the first of Houlsby et al.'s two per layer).",
        ),
        "logistic-regression": Entry(
            "zinit.methods.logistic_regression:LogisticRegression",
            "Logistic regression on frozen features; for tasks with one feature vector per example.",
        ),
    },
    group="zinit.methods",
)
