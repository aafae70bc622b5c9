"""What a backbone that generates promises on top: the same words at a closed gate, prefixes computed once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zinit
from tests.contract.cases import CASES, Case, causal_lm
from zinit.adapter.scopes import changes_of
from zinit.adapter.state import ATTRIBUTE

CLOSED = zinit.PrefixConfig(length=5, layers=2)
OPEN = zinit.PrefixConfig(length=5, layers=2, gate_init=0.7)
JOINT = zinit.PrefixConfig(length=5, layers=2, gating=False, separate_softmax=False)
JOINT_GATED = zinit.PrefixConfig(length=5, layers=2, gate_init=0.7, separate_softmax=False)
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "static": {"cache_implementation": "static"},
    "uncached": {"use_cache": False},
    "beams": {"num_beams": 3},
    "sampled": {"do_sample": True, "num_return_sequences": 2, "top_k": 20},
}
NEW = 6


def generate(case: Case, model: Any, padding: str = "left", **settings: Any) -> tuple[Tensor, Tensor]:
    """Generated ids (rows, T + NEW), and the logits they were chosen from (NEW, rows, vocabulary)."""
    torch.manual_seed(0)
    settings = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW} | settings
    out = model.generate(**case.batch(padding), **settings, return_dict_in_generate=True, output_logits=True)
    return out.sequences, torch.stack(out.logits)


@contextmanager
def counted_projections(model: nn.Module) -> Iterator[dict[str, int]]:
    """{site: how often the prompts went through the host's projections} while inside."""
    slots = getattr(model, ATTRIBUTE).slots
    counts = dict.fromkeys(slots, 0)
    originals = {name: slot.project_kv for name, slot in slots.items()}

    def counting(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
        def project(host: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
            counts[name] += 1
            return originals[name](host, tokens)

        return project

    for name, slot in slots.items():
        slot.project_kv = counting(name)
    try:
        yield counts
    finally:
        for name, slot in slots.items():
            slot.project_kv = originals[name]


def nothing_is_kept(model: nn.Module) -> bool:
    state = getattr(model, ATTRIBUTE)
    return not state.open and not changes_of(state.key) and all(slot.cached_kv is None for slot in state.slots.values())


def train_step(case: Case, model: Any, handle: zinit.Handle, learning_rate: float = 0.1) -> dict[str, Tensor]:
    """One step of plain SGD; returns the gradients."""
    model.train()
    case.output(model, case.batch("left")).square().mean().backward()
    grads: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, parameter in handle.named_parameters():
            assert parameter.grad is not None, name
            grads[name] = parameter.grad.clone()
            parameter.sub_(learning_rate * parameter.grad)
            parameter.grad = None
    model.eval()
    return grads


# --- closed and open ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_closed_gate_generates_the_same(generator: Case, mode: str, dtype: torch.dtype) -> None:
    model = generator.build().to(dtype)
    for implementation in generator.implementations:
        model.set_attn_implementation(implementation)  # pyright: ignore[reportCallIssue]
        for padding in generator.paddings:
            ids, scores = generate(generator, model, padding, **MODES[mode])
            assert ids.shape[1] == 9 + NEW
            handle = zinit.attach(model, CLOSED)
            now, now_scores = generate(generator, model, padding, **MODES[mode])
            assert torch.equal(now, ids), (implementation, padding)
            assert torch.equal(now_scores, scores), (implementation, padding)
            handle.detach()


@pytest.mark.parametrize("mode", MODES)
def test_an_open_gate_generates_something_else(generator: Case, mode: str) -> None:
    model = generator.build()
    frozen, _ = generate(generator, model, **MODES[mode])
    handle = zinit.attach(model, OPEN)
    assert not torch.equal(generate(generator, model, **MODES[mode])[0], frozen)
    with handle.disabled():
        assert torch.equal(generate(generator, model, **MODES[mode])[0], frozen)
    handle.detach()
    assert torch.equal(generate(generator, model, **MODES[mode])[0], frozen)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("config", [OPEN, JOINT, JOINT_GATED], ids=["gated", "joint", "joint-gated"])
def test_every_kind_of_cache_agrees(generator: Case, config: zinit.PrefixConfig, padding: str) -> None:
    for implementation in generator.implementations:
        model = generator.build()
        model.set_attn_implementation(implementation)  # pyright: ignore[reportCallIssue]
        zinit.attach(model, config, seed=0)
        ids, scores = generate(generator, model, padding, use_cache=False)
        for mode in ("greedy", "static"):
            now, now_scores = generate(generator, model, padding, **MODES[mode])
            torch.testing.assert_close(now_scores, scores, atol=1e-4, rtol=1e-4)
            assert torch.equal(now, ids), (implementation, mode)


def test_generation_is_the_forward_pass(generator: Case) -> None:
    """What was frozen for the generation is what the model computes without it."""
    model = generator.build()
    zinit.attach(model, OPEN, seed=0)
    ids, scores = generate(generator, model, "left")
    mask = torch.cat([generator.batch("left")["attention_mask"], torch.ones(3, NEW, dtype=torch.long)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # as generate counts them
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(scores.transpose(0, 1), whole[:, 8 : 8 + NEW], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_generation_under_autocast_is_the_forward_pass(generator: Case, dtype: torch.dtype) -> None:
    model: Any = generator.build().to(dtype)
    zinit.attach(model, OPEN, seed=0)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        _, scores = generate(generator, model, "none", max_new_tokens=1, min_new_tokens=1)
        whole = model(**generator.batch("none"), logits_to_keep=1).logits
    assert torch.equal(scores[0], whole[:, -1].to(scores.dtype))


# --- once per generation, never longer ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_prefixes_are_computed_once_per_generation(generator: Case, mode: str) -> None:
    model = generator.build()
    zinit.attach(model, OPEN)
    with counted_projections(model) as counts:
        generate(generator, model, **MODES[mode])
        assert set(counts.values()) == {1}
        generate(generator, model, **MODES[mode])
        assert set(counts.values()) == {2}
    assert nothing_is_kept(model)


def test_training_and_generating_take_turns(generator: Case) -> None:
    """Keys and values never outlive a generation, and gradients flow after it as if it had not been."""
    model, twin = generator.build(), generator.build()
    handle, reference = zinit.attach(model, OPEN, seed=0), zinit.attach(twin, OPEN, seed=0)
    outputs: list[Tensor] = []
    for _ in range(3):
        outputs.append(generate(generator, model)[1])
        assert nothing_is_kept(model)
        with torch.no_grad():
            generator.output(model, generator.batch("left"))  # a validation
        grads, expected = train_step(generator, model, handle), train_step(generator, twin, reference)
        for name, grad in expected.items():
            assert grad.abs().max() > 0, name
            assert torch.equal(grads[name], grad), name
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])
    fresh = generator.build()
    zinit.attach(fresh, OPEN).load_state_dict(handle.state_dict())
    assert torch.equal(generate(generator, model)[1], generate(generator, fresh)[1])


def test_a_gradient_step_inside_the_scope_sees_the_weights(generator: Case) -> None:
    """Whoever wants gradients never gets what was frozen."""
    model, twin = generator.build(), generator.build()
    handle, reference = zinit.attach(model, OPEN, seed=0), zinit.attach(twin, OPEN, seed=0)
    with handle.frozen_prefix():
        for _ in range(2):
            grads, expected = train_step(generator, model, handle), train_step(generator, twin, reference)
            assert all(torch.equal(grads[name], grad) for name, grad in expected.items())
    assert nothing_is_kept(model)


def test_nothing_is_kept_after_a_failed_generation(generator: Case) -> None:
    model: Any = generator.build()
    zinit.attach(model, OPEN)
    with pytest.raises(ValueError, match="unheard_of"):
        model.generate(**generator.batch("left"), unheard_of=1)
    assert nothing_is_kept(model)


def test_generation_in_inference_mode_leaves_training_alone(generator: Case) -> None:
    model = generator.build()
    handle = zinit.attach(model, OPEN)
    with torch.inference_mode():
        generate(generator, model)
    assert nothing_is_kept(model)
    train_step(generator, model, handle)


def test_what_changes_inside_a_frozen_scope_is_noticed(generator: Case) -> None:
    """Contexts, switches and loaded values: each is computed anew although an outer scope had frozen the prefix."""
    model = generator.build()
    first = zinit.attach(model, OPEN, name="first", seed=0)
    of_first = generate(generator, model)[1]
    context = torch.randn(3, 1, generator.width)
    with first.context(context):
        with_context = generate(generator, model)[1]
    second = zinit.attach(model, OPEN, name="second", seed=1)
    of_second = generate(generator, model)[1]
    assert not torch.equal(of_first, of_second)
    assert not torch.equal(of_first, with_context)
    with second.frozen_prefix():
        assert torch.equal(generate(generator, model)[1], of_second)
        first.activate()
        assert torch.equal(generate(generator, model)[1], of_first)
        with first.context(context):
            assert torch.equal(generate(generator, model)[1], with_context)
        assert torch.equal(generate(generator, model)[1], of_first)
        first.load_state_dict(second.state_dict())
        assert torch.equal(generate(generator, model)[1], of_second)
        with first.disabled():
            third = zinit.attach(model, OPEN, name="third", seed=0)
        assert torch.equal(generate(generator, model)[1], of_first)
        third.detach()
    assert nothing_is_kept(model)


# --- a context for each sample ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("mode", ["greedy", "static", "uncached", "beams"])
def test_a_context_in_generate(generator: Case, mode: str, rows: int) -> None:
    """Every sample is continued as if it were alone with its own context, over all its beams."""
    model: Any = generator.build()
    handle = zinit.attach(model, OPEN, seed=0)
    context = 2 * torch.randn(3, rows, generator.width)
    batch = generator.batch("none")
    settings = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW} | MODES[mode]
    plain = model.generate(**batch, **settings)
    with handle.context(context), counted_projections(model) as counts:
        together = model.generate(**batch, **settings)
        assert set(counts.values()) == {1}
    assert not torch.equal(together, plain)
    for row in range(3):
        with handle.context(context[row : row + 1]):
            alone = model.generate(**{name: tensor[row : row + 1] for name, tensor in batch.items()}, **settings)
        assert torch.equal(alone[0], together[row])
    assert torch.equal(model.generate(**batch, **settings), plain)


def test_a_context_for_another_number_of_samples_is_refused(generator: Case) -> None:
    model = generator.build()
    handle = zinit.attach(model, OPEN)
    with pytest.raises(zinit.ConfigError, match="for 2 samples"), handle.context(torch.zeros(2, 1, generator.width)):
        generate(generator, model)
    assert nothing_is_kept(model)


# --- the model's own API ------------------------------------------------------------------------------------------


def test_generate_keeps_its_signature(generator: Case) -> None:
    model: Any = generator.build()
    expected = inspect.signature(model.generate)
    zinit.attach(model, OPEN)
    assert inspect.signature(model.generate) == expected
    assert model.generate.__self__ is model
    assert model.generate.__doc__ == type(model).generate.__doc__


def test_each_class_keeps_its_own_generate() -> None:
    import transformers

    class Odd(transformers.LlamaForCausalLM):
        def generate(self, *args: Any, odd: int = 0, **kwargs: Any) -> Any:
            """Odd."""
            return super().generate(*args, **kwargs)

    plain: Any = causal_lm("Llama")
    odd: Any = Odd(plain.config)
    zinit.attach(plain, OPEN)
    zinit.attach(odd, OPEN)
    assert "odd" in inspect.signature(odd.generate).parameters
    assert "odd" not in inspect.signature(plain.generate).parameters
    odd.generate(**CASES[0].batch("left"), odd=1, max_new_tokens=1)


def tiny_tokenizer(vocabulary: int = 61) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {
        word: index for index, word in enumerate(["<pad>", "<s>", "<unk>", *(f"w{i}" for i in range(3, vocabulary))])
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", unk_token="<unk>", padding_side="left"
    )


def test_the_text_generation_pipeline(generator: Case) -> None:
    import transformers

    model: Any = generator.build()
    pipeline = transformers.pipeline("text-generation", model=model, tokenizer=tiny_tokenizer())
    texts = ["w5 w6 w7 w8 w9", "w20 w4"]
    settings: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "batch_size": 2}
    frozen = pipeline(texts, **settings)
    handle = zinit.attach(model, CLOSED)
    assert pipeline(texts, **settings) == frozen
    with torch.no_grad():
        for prefix in handle.prefixes.values():
            prefix.gate.fill_(0.7)
    with counted_projections(model) as counts:
        assert pipeline(texts, **settings) != frozen
        assert set(counts.values()) == {1}
    again = transformers.pipeline("text-generation", model=model, tokenizer=tiny_tokenizer())  # made after attaching
    assert again(texts, **settings) == pipeline(texts, **settings)
    handle.detach()
    assert pipeline(texts, **settings) == frozen


def test_the_adapted_model_saves_a_clean_config(generator: Case, tmp_path: Path) -> None:
    model: Any = generator.build()
    model.config.save_pretrained(tmp_path / "before")
    zinit.attach(model, OPEN)
    model.save_pretrained(tmp_path / "after")
    before, after = ((tmp_path / name / "config.json").read_text() for name in ("before", "after"))
    assert "zinit" not in after
    assert {line for line in after.splitlines() if "architectures" not in line} >= set(before.splitlines()) - {
        line for line in before.splitlines() if "architectures" in line or "dtype" in line
    }


@pytest.mark.slow
def test_flex_attention_forward(leader: Case) -> None:
    """On a CPU torch's flex attention runs forward only, and not for a single query."""
    if not leader.generates or not leader.implementations:
        pytest.skip("no causal model of transformers")
    model: Any = leader.build()
    handle = zinit.attach(model, OPEN, seed=0)
    with torch.no_grad():
        batch = leader.batch("left")
        words = batch["attention_mask"].bool()
        expected = model(**batch).logits[words]
        handle.detach()
        model.set_attn_implementation("flex_attention")
        frozen = model(**batch).logits
        handle = zinit.attach(model, CLOSED)
        assert torch.equal(model(**batch).logits, frozen)
        handle.detach()
        zinit.attach(model, OPEN, seed=0)
        torch.testing.assert_close(model(**batch).logits[words], expected, atol=1e-4, rtol=1e-4)
        zinit.get_handle(model).detach()
        zinit.attach(model, JOINT)
        with pytest.raises(zinit.BackboneError, match="'sdpa' or 'eager'"):
            model(**batch)
