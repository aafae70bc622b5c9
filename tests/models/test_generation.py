"""What lies beside the weights: a measurement does not see it, a chat says which of it counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from tests.tiny import byte_tokenizer, save_tiny_llama
from zinit.config import PrefixConfig
from zinit.errors import ConfigError
from zinit.methods.base import ApplyContext
from zinit.methods.prompt_tuning import PromptTuning, PromptTuningSettings
from zinit.models.generation import conversational
from zinit.tasks.alpaca.task import Alpaca, AlpacaConfig
from zinit.tasks.base import TaskInputs

PROMPTS = ["Say red", "Say a very long word", "b"]
BESIDE: dict[str, Any] = {  # an entry of generation_config.json each
    **{"max_length": 3, "max_new_tokens": 1, "min_length": 900, "min_new_tokens": 7, "max_time": 1e-9},
    **{"do_sample": True, "temperature": 30.0, "top_k": 3, "top_p": 0.5, "min_p": 0.2, "typical_p": 0.3},
    **{"num_beams": 3, "num_return_sequences": 2, "early_stopping": True, "length_penalty": 4.0},
    **{"repetition_penalty": 9.0, "encoder_repetition_penalty": 9.0, "no_repeat_ngram_size": 1},
    **{"suppress_tokens": list(range(3, 200)), "begin_suppress_tokens": list(range(3, 200))},
    **{"bad_words_ids": [[token] for token in range(3, 200)], "sequence_bias": [[[70], 99.0]]},
    **{"forced_bos_token_id": 9, "forced_eos_token_id": 1, "exponential_decay_length_penalty": [1, 9.0]},
    **{"stop_strings": ["a"], "guidance_scale": 3.0, "penalty_alpha": 0.6, "dola_layers": "high"},
    **{"prompt_lookup_num_tokens": 2, "token_healing": True, "cache_implementation": "static", "use_cache": False},
    **{"return_dict_in_generate": True, "output_scores": True, "output_attentions": True, "renormalize_logits": True},
    **{"eos_token_id": list(range(3, 264)), "pad_token_id": 200, "bos_token_id": 5, "force_words_ids": [[[70]]]},
    **{"watermarking_config": {"bias": 9.0}, "diversity_penalty": 3.0, "num_beam_groups": 3, "made_up_entry": 1},
}


def task(model: Any, folder: Path, **settings: Any) -> Alpaca:
    (folder / "data.json").write_text(json.dumps([{"instruction": f"Do {i}", "output": "yes"} for i in range(4)]))
    inputs = TaskInputs(model=model, processor=byte_tokenizer(), data=str(folder / "data.json"))
    return Alpaca(inputs, AlpacaConfig(**{"max_new_tokens": 6, "max_length": 200, **settings}))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model that has ended some answers when others go on."""
    model: Any = LlamaForCausalLM.from_pretrained(save_tiny_llama(tmp_path_factory.mktemp("model"))).eval()
    ids = torch.tensor([Alpaca.encode_prompt(byte_tokenizer(), PROMPTS[0])])
    third = int(model.generate(ids, max_new_tokens=3, do_sample=False)[0, -1])
    with torch.no_grad():  # the token that the first answer has in the third place becomes the one that ends it
        model.lm_head.weight[[1, third]] = model.lm_head.weight[[third, 1]].clone()
    return model


def test_a_measurement_sees_nothing_beside_the_weights(model: Any, tmp_path: Path) -> None:
    t = task(model, tmp_path)
    expected, own = t.answer(PROMPTS), model.generation_config
    assert len(set(map(len, expected))) > 1
    try:
        for name, value in BESIDE.items():
            model.generation_config = beside = GenerationConfig()
            setattr(beside, name, value)
            assert t.answer(PROMPTS) == expected, name
            assert model.generation_config is beside
            assert getattr(beside, name) == value
    finally:
        model.generation_config = own


def test_entries_beside_the_weights_would_change_answers(model: Any, tmp_path: Path) -> None:
    """The test above can fail: without a configuration of its own, evaluation would give other answers."""
    t, own = task(model, tmp_path), model.generation_config
    expected = t.answer(["Say red"])
    ids = torch.tensor([Alpaca.encode_prompt(t.tokenizer, "Say red")])
    try:
        model.generation_config = GenerationConfig(suppress_tokens=BESIDE["suppress_tokens"])
        found = model.generate(ids, generation_config=GenerationConfig(max_new_tokens=6, eos_token_id=1))
    finally:
        model.generation_config = own
    assert t.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True).strip() != expected[0]


def test_a_chat_takes_what_shapes_answers_and_says_so(model: Any) -> None:
    beside = {"repetition_penalty": 1.3, "num_beams": 4, "temperature": 0.9, "min_p": 0.1, "eos_token_id": [7, 1]}
    own, model.generation_config = model.generation_config, GenerationConfig(**beside)
    try:
        config, used, ignored = conversational(model, eos_token_id=1, max_new_tokens=5, do_sample=False)
        assert used == {"repetition_penalty": 1.3, "eos_token_id": [7, 1]}
        assert ignored == ["num_beams"]
        assert (config.repetition_penalty, config.eos_token_id, config.num_beams) == (1.3, [1, 7], None)
        _, used, _ = conversational(model, eos_token_id=1, max_new_tokens=5, do_sample=True, temperature=0.1)
        assert used["min_p"] == 0.1
        model.generation_config = GenerationConfig(eos_token_id=1, bos_token_id=0)
        assert conversational(model, eos_token_id=1, do_sample=False)[1:] == ({}, [])
    finally:
        model.generation_config = own


def gpt2(positions: int) -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=264, n_positions=positions, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1
        )
    ).eval()


def test_answers_end_where_the_positions_do(tmp_path: Path) -> None:
    """Learned positions: behind the last one is an IndexError. A short prompt's answer does not end by a long one's."""
    t = task(gpt2(300), tmp_path, max_length=300, max_new_tokens=30)
    prompts = ["a" * 290, "b" * 10, "c" * 285]
    found = t.answer(prompts)
    tokens = [len(t.tokenizer(text)["input_ids"]) for text in found]
    assert [t.answer([prompt])[0] for prompt in prompts] == found
    assert tokens[0] <= 9
    assert tokens[2] <= 14


def test_virtual_tokens_take_positions_too(tmp_path: Path) -> None:
    adapted = PromptTuning(PromptTuningSettings(length=20)).apply(
        gpt2(300), ApplyContext(prefix=PrefixConfig(), backbone="llama", seed=0)
    )
    t = task(adapted.model, tmp_path, max_length=280, max_new_tokens=30)
    read: list[int] = []
    adapted.model.get_base_model().transformer.wpe.register_forward_hook(  # pyright: ignore
        lambda module, args, output: read.append(args[0].shape[-1])
    )
    t.answer(["a" * 270])  # 271 tokens behind 20: 9 positions are left
    assert read == [291] + [1] * 8
    read.clear()
    with adapted.disabled():
        t.answer(["a" * 270])
    assert read[0] == 271


def test_examples_leave_virtual_tokens_room(tmp_path: Path) -> None:
    def made(length: int, **settings: Any) -> Alpaca:
        apply = PromptTuning(PromptTuningSettings(length=length)).apply
        model = apply(gpt2(300), ApplyContext(prefix=PrefixConfig(), backbone="llama", seed=0)).model
        return task(model, tmp_path, **{"max_length": 300, **settings})

    longest = max(made(1).train_stream.lengths)
    made(300 - longest)
    with pytest.raises(ConfigError, match=rf"an example has {longest} tokens, but .* for {longest - 1}, .*-o task.max"):
        made(301 - longest)
    with pytest.raises(ConfigError, match=r"task\.max_length is 301, but"):
        made(1, max_length=301)


def test_virtual_tokens_stand_in_front_once(tmp_path: Path) -> None:
    """Every generated token is the likeliest after the prompts and all tokens before it, of a padded batch too."""
    adapted = PromptTuning(PromptTuningSettings(length=5)).apply(
        gpt2(300), ApplyContext(prefix=PrefixConfig(), backbone="llama", seed=0)
    )
    t = task(adapted.model, tmp_path)
    model = adapted.model.eval()
    with torch.no_grad():
        ids = torch.tensor([Alpaca.encode_prompt(t.tokenizer, PROMPTS[0])])
        start = ids.shape[1]
        for _ in range(6):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(dim=-1)], dim=1)
    assert t.answer(PROMPTS)[0] == t.tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()
