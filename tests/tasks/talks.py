"""Tokenizers of every kind and chat templates of every habit, for tests of conversations."""

from __future__ import annotations

from copy import copy
from functools import cache
from typing import Any

from transformers import AutoTokenizer, GPT2Tokenizer, LlamaTokenizer, RobertaTokenizer

from tests.shared import SHARED
from tests.tiny import byte_tokenizer
from zinit.data.conversations import Conversation, Round
from zinit.demo import llama_path

TOKENS = SHARED / "data" / "tokenizers"
TURN = (
    "{{ '<|turn|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|done|>' }}"
    "{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message.content + '<|done|>\\n' }}{% endif %}"
)
CHATS = {
    "marked": "{% for message in messages %}" + TURN + "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\\n' }}{% endif %}",
    "told": "{% if messages[0].role != 'system' %}{{ '<|turn|>system\\nBe kind.<|done|>\\n' }}{% endif %}"
    "{% for message in messages %}" + TURN + "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\\n' }}{% endif %}",
    "brackets": "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ ' ' + message.content | trim + ' ' + eos_token }}{% else %}{{ '[ASK] ' + message.content | trim + ' [/ASK]' }}"
    "{% endif %}{% endfor %}",
    "no-system": "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}"
    "{{ raise_exception('no system text, please') }}{% endif %}{{ '<|turn|>' + message.role + '\\n' }}"
    "{{ message.content + '<|done|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\\n' }}{% endif %}",
    "words": "{% for message in messages %}{{ message.role | upper + ': ' + message.content + '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
}
REWRITES = (  # an answer is written in full only while it is the last
    "{% for message in messages %}{{ '<|turn|>' + message.role + '\\n' }}"
    "{{ ('(no thoughts)' if message.role == 'assistant' and loop.last else '') + message.content + '<|done|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|turn|>assistant\\n(no thoughts)' }}{% endif %}"
)
DROPS = (
    "{% for message in (messages[1:] if messages | length > 2 else messages) %}"
    "{{ message.content + '<|done|>' }}{% endfor %}"
)


def tokenizer(kind: str, chat: str | None = None) -> Any:
    """One of `KINDS`, with a chat template of `CHATS` or of its own text."""
    made = copy(_load(kind))
    made.chat_template = CHATS.get(chat, chat) if chat else None
    return made


@cache
def _load(kind: str) -> Any:
    made: Any
    if kind == "bytes":
        made = byte_tokenizer()
    elif kind == "demo":
        made = AutoTokenizer.from_pretrained(llama_path())
    elif kind == "gpt2":
        made = GPT2Tokenizer(vocab=str(TOKENS / "gpt2" / "encoder.json"), merges=str(TOKENS / "gpt2" / "vocab.bpe"))
    elif kind == "roberta":
        folder = TOKENS / "roberta"
        made = RobertaTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    else:
        made = LlamaTokenizer.from_pretrained(TOKENS / "llama", legacy=kind == "llama-legacy")
    made.add_special_tokens({"extra_special_tokens": ["<|turn|>", "<|done|>"]})
    return made


OWN_KINDS = ("bytes", "demo")
KINDS = (*OWN_KINDS, "gpt2", "roberta", "llama-legacy", "llama")


def talk(*texts: str, **fields: Any) -> Conversation:
    """A conversation of texts in turn; the last may be a question."""
    pairs = zip(texts[::2], [*texts[1::2], *([""] * (len(texts) % 2))], strict=True)
    return Conversation(rounds=tuple(Round(question=asked, answer=answer) for asked, answer in pairs), **fields)
