"""How many positions a model has, by its config and its tables; and rows for all tokens of its tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    MptConfig,
    MptModel,
    OPTConfig,
    OPTModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
)

from tests.contract.cases import clip
from tests.tasks.encoder import encoder_tokenizer, tiny_encoder
from tests.tiny import byte_tokenizer, save_tiny_llama
from zinit.errors import BackboneError, ConfigError
from zinit.models.loading import ClipProcessor
from zinit.models.room import check_positions, check_vocabulary, positions
from zinit.models.several import ModelSpec, load_model
from zinit.tasks import TASKS
from zinit.tasks.base import load_host

SMALL: dict[str, Any] = {
    **{"vocab_size": 24, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"intermediate_size": 8, "max_position_embeddings": 24, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
}
LEARNED: dict[str, tuple[Callable[[], Any], int]] = {  # as many words as positions: tables alone do not tell them apart
    "roberta": (lambda: RobertaModel(RobertaConfig(**SMALL)), 22),
    "bert": (lambda: BertModel(BertConfig(**SMALL)), 24),
    "gpt2": (lambda: GPT2Model(GPT2Config(n_positions=24, n_embd=8, n_layer=1, n_head=2, vocab_size=24)), 24),
    "opt": (lambda: OPTModel(OPTConfig(ffn_dim=8, word_embed_proj_dim=8, **SMALL)), 24),
    "mpt": (lambda: MptModel(MptConfig(d_model=8, n_heads=2, n_layers=1, max_seq_len=24, vocab_size=24)), 24),
}


@pytest.mark.parametrize("name", LEARNED)
def test_the_last_position_is_the_last(name: str) -> None:
    build, room = LEARNED[name]
    model = build().eval()
    assert positions(model) == room
    model(input_ids=torch.full((1, room), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, room + 1), 5))
    check_positions(model, room)
    with pytest.raises(ConfigError, match=rf"max_length is {room + 1}, but the model has room for {room} tokens: -o"):
        check_positions(model, room + 1)


def test_what_else_limits_and_what_does_not() -> None:
    assert positions(LlamaModel(LlamaConfig(**SMALL))) == 24
    dual: Any = clip()
    assert positions(dual) == dual.config.text_config.max_position_embeddings
    assert positions(BloomModel(BloomConfig(vocab_size=24, hidden_size=8, n_layer=1, n_head=2))) is None
    assert positions(T5EncoderModel(T5Config(vocab_size=24, d_model=8, d_kv=4, d_ff=8, num_layers=1))) is None
    assert positions(torch.nn.Linear(2, 2)) is None


def with_another(tokenizer: Any, *tokens: str) -> Any:
    tokenizer.add_tokens([f"<t{index}>" for index in range(6)])  # fills the rows that a tiny model has to spare
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def test_a_token_without_a_row_is_named() -> None:
    model = tiny_encoder()  # 260 rows for 260 tokens
    check_vocabulary(model, encoder_tokenizer(), "there")
    with pytest.raises(
        BackboneError, match=r"there: the tokenizer has the token '<t0>' \(number 260\) and 6 more, but .* 260 rows"
    ):
        check_vocabulary(model, with_another(encoder_tokenizer(), "<new>"), "there")
    dual: Any = clip()
    rows = dual.config.text_config.vocab_size
    tokenizer = byte_tokenizer()
    with pytest.raises(BackboneError, match=rf"\(number {rows}\) and {len(tokenizer) - rows - 1} more, but"):
        check_vocabulary(dual, ClipProcessor(tokenizer), "there")
    check_vocabulary(torch.nn.Linear(2, 2), tokenizer, "models without words are not looked at")
    check_vocabulary(model, {"mean": 0.5}, "nor what is no tokenizer")


def test_every_task_checks_when_it_loads(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "llama")
    with_another(byte_tokenizer(), "<new>").save_pretrained(tmp_path / "llama")
    with pytest.raises(BackboneError, match=r"'<t5>' \(number 264\)"):
        load_host(TASKS.get("alpaca"), tmp_path / "llama", trains=False, dtype=torch.float32)
    spec = ModelSpec(source=str(tmp_path / "llama"), loader="zinit.models.loading:load_causal_lm")
    with pytest.raises(BackboneError, match=r"the task's model 'reader': .*'<t5>' \(number 264\)"):
        load_model("reader", spec, dtype=torch.float32)
