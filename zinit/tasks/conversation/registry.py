"""Templates of conversations by name. A new one is a few lines in `zinit.tasks.conversation.template`, and one here."""

from zinit.registry import Entry, Registry

HERE = "zinit.tasks.conversation.template"
AUTO, OWN = "auto", "tokenizer"
TEMPLATES = Registry(
    "template",
    {
        OWN: Entry(f"{HERE}:Tokenizers", "The chat template that came with the tokenizer."),
        "vicuna": Entry(f"{HERE}:Vicuna", "Vicuna's, version 1.1: USER and ASSISTANT."),
        "alpaca": Entry(f"{HERE}:Alpaca", "Alpaca's instruction, input and response, a section for every round."),
        "chat65b": Entry(f"{HERE}:Chat65B", "LLaMA-Adapter V2's 65B chat model: Human and Assistant between ###."),
    },
    group="zinit.templates",
)
