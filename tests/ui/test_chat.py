"""A chat follows the model's own generation settings, says which, and what is wrong with them is one message."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from tests.contract.cases import causal_lm
from tests.encoders.test_encoders import saved
from tests.experts.stubs import registered
from tests.tasks.talks import talk, tokenizer
from tests.tiny import byte_tokenizer
from zinit.adapter.attach import attach
from zinit.config import AdapterConfig, PrefixConfig
from zinit.errors import ConfigError, DataError
from zinit.methods.base import Adapted
from zinit.runs.directory import SavedRun
from zinit.runs.record import Record
from zinit.tasks.conversation.config import ConversationConfig
from zinit.ui import chat
from zinit.ui.chat import ChatSession


def replaced(monkeypatch: pytest.MonkeyPatch, config: Any, model: Any, tokenizer: Any, handle: Any) -> None:
    """A run that is not read from a folder."""

    def load_saved(run: Any, device: torch.device, *, base: bool) -> Any:
        adapted = Adapted(model=model.to(device), handle=handle, disabled=handle.disabled)
        return SimpleNamespace(adapted=adapted, processor=tokenizer)

    run = SavedRun(folder=Path("run"), config=config, record=Record())
    monkeypatch.setattr(SavedRun, "read", lambda where: run)
    monkeypatch.setattr(chat, "load_saved", load_saved)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model with learned positions, in the place of a run's."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 264, "n_positions": 120, "n_embd": 32, "n_layer": 1, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=1)).eval()
    handle = attach(model, PrefixConfig(length=2))
    replaced(monkeypatch, SimpleNamespace(task="alpaca", options=None), model, byte_tokenizer(), handle)
    return model


def answer(prompt: str = "red", **settings: Any) -> str:
    session = ChatSession("run", **{"temperature": 0, "max_new_tokens": 8, **settings})
    return session.answer(prompt, raw=True, stream=False)


def test_the_models_own_settings_count_and_are_named(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    plain = answer()
    assert capsys.readouterr().err == ""
    model.generation_config = GenerationConfig(suppress_tokens=list(range(3, 200)), num_beams=2, temperature=0.3)
    assert answer() != plain
    said = capsys.readouterr().err
    assert "generation settings this uses suppress_tokens=[3, 4" in said
    assert "it does not use num_beams)" in said


@pytest.mark.parametrize("entry", [{"bad_words_ids": [["x"]]}, {"sequence_bias": [[[900], 1.0]]}], ids=str)
def test_settings_that_cannot_be_used_are_one_message(model: Any, entry: dict[str, Any]) -> None:
    for name, value in entry.items():
        setattr(model.generation_config, name, value)
    with pytest.raises(ConfigError, match=r"generation_config\.json cannot be used: .*Correct the file, or remove it"):
        answer()


def test_a_temperature_that_logits_cannot_be_divided_by_takes_the_likeliest_token(model: Any) -> None:
    assert answer(temperature=1e-40) == answer(temperature=9e-5) == answer()


def test_an_answer_ends_where_the_positions_do(model: Any) -> None:
    passes: list[None] = []
    model.register_forward_hook(lambda *_: passes.append(None))
    answer("a" * 110, max_new_tokens=50)
    assert len(passes) == 120 - 111
    with pytest.raises(ConfigError, match="the prompt has 121 tokens, but the model has room for 120"):
        answer("a" * 120)


# Templates, system texts, images


class Saying:
    """In the place of a model's: says a text over and over, and notes what it was asked."""

    def __init__(self, model: Any, text: str) -> None:
        self.asked: list[list[int]] = []
        self.ids = tokenizer("bytes")(text, add_special_tokens=False)["input_ids"]
        self.model, self.steps = model, 0
        model.register_forward_hook(self.after, with_kwargs=True)

    def after(self, module: Any, args: Any, given: dict[str, Any], output: Any) -> Any:
        if given["input_ids"].shape[1] > 1:
            self.asked.append(given["input_ids"][0].tolist())
            self.steps = 0
        output.logits[:] = 0
        output.logits[:, -1, self.ids[self.steps % len(self.ids)]] = 9.0
        self.steps += 1
        return output


def talking(monkeypatch: pytest.MonkeyPatch, form: str, text: str, **adapter: Any) -> tuple[Saying, Any]:
    """A run of the task conversation with a model that says a text, and its handle."""
    model: Any = causal_lm("Llama", vocab_size=272, max_position_embeddings=600)
    handle = attach(model, adapter.pop("config", PrefixConfig(length=2)), **adapter)
    speaker = tokenizer("bytes", "marked" if form == "tokenizer" else None)
    options = SimpleNamespace(task="conversation", options=ConversationConfig(template=form))
    replaced(monkeypatch, options, model, speaker, handle)
    return Saying(model, text), handle


@pytest.mark.parametrize(
    ("form", "says"), [("tokenizer", "Hello<|done|>x"), ("vicuna", "Hello</s>x"), ("chat65b", "Hel# lo###x")]
)
def test_a_chat_is_written_as_the_template_that_was_trained(
    form: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = talking(monkeypatch, form, says)
    session = ChatSession("run", temperature=0, max_new_tokens=20, system="Be kind.")
    monkeypatch.setattr("sys.stdin", io.StringIO("first\nsecond\n/new\nthird\n"))
    session.converse()
    answer = "Hel# lo" if form == "chat65b" else "Hello"
    assert capsys.readouterr().out.split("\n") == [answer] * 3 + [""], "nothing of what ends an answer is printed"
    expected = [
        talk("first", system="Be kind."),
        talk("first", answer, "second", system="Be kind."),
        talk("third", system="Be kind."),
    ]
    assert model.asked == [session.format.prompt(one) for one in expected]
    assert model.steps == len(session.tokenizer(answer)["input_ids"]) + (3 if form == "chat65b" else 1)


def test_one_answer_has_the_system_text_and_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = talking(monkeypatch, "alpaca", "yes</s>")
    session = ChatSession("run", temperature=0, system="Lie.")
    assert session.answer("Is it?", input="A cat.", stream=False) == "yes"
    text = session.tokenizer.decode(model.asked[0])
    assert text == "<s>Lie.\n\n### Instruction:\nIs it?\n\n### Input:\nA cat.\n\n### Response:"
    with pytest.raises(ConfigError, match="leave out --raw or --system"):
        session.answer("Is it?", raw=True)


def test_images_of_a_chat_stay_until_it_starts_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = AdapterConfig(
        parts={"late": PrefixConfig(length=3, layers=2, prompt="table+context")},
        context="projected-image",
        context_options={"layers": 2, "hidden": 6},
    )
    _, handle = talking(monkeypatch, "alpaca", "yes</s>", config=config, encoder=saved(tmp_path / "encoder"))
    shown: list[list[tuple[int, int]]] = []
    features = ChatSession._features

    def spy(self: ChatSession, handle: Any, images: Any) -> Any:
        shown.append([one.size for one in images])
        return features(self, handle, images)

    given, reached = handle.given, []

    def reaches(**what: Any) -> Any:
        reached.append(what["features"])
        return given(**what)

    monkeypatch.setattr(ChatSession, "_features", spy)
    monkeypatch.setattr(handle, "given", reaches)
    for side in (4, 5):
        Image.new("RGB", (side, side)).save(tmp_path / f"{side}.png")
    (tmp_path / "bad.png").write_text("no image")
    lines = ("a", f"/image {tmp_path}/5.png", f"/image {tmp_path}/bad.png", "/image", "b", "/new", "c")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    session = ChatSession("run", temperature=0, max_new_tokens=4)
    session.converse([tmp_path / "4.png"])
    assert shown == [[(4, 4)], [(4, 4), (5, 5)]]
    said = capsys.readouterr()
    assert said.out.count("yes") == 3
    assert "bad.png is no image that can be read" in said.out + said.err
    assert session.answer("d", images=[tmp_path / "5.png"], stream=False) == "yes"
    assert shown[2:] == [[(5, 5)]]
    with pytest.raises(DataError, match=r"there is no image .*gone.png"):
        session.answer("d", images=[tmp_path / "gone.png"])
    assert "is not seen" not in said.err
    ChatSession("run", temperature=0, base=True).answer("d", images=[tmp_path / "5.png"], stream=False)
    assert "5.png is not seen: images reach the model by the adapter, which is off" in capsys.readouterr().err
    assert len(shown) == len(reached) == 3, "the base sees none"


def test_experts_write_into_the_input_of_the_last_question(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an adapter that takes no images."""
    model, _ = talking(monkeypatch, "alpaca", "yes</s>")
    for red in (9, 99):
        Image.new("RGB", (4, 4), (red, 0, 0)).save(tmp_path / f"{red}.png")
    with registered():
        session = ChatSession("run", temperature=0, max_new_tokens=4, experts="repeater,painter:50")
        kept = session.answer("Is it?", input="A cat.", images=[tmp_path / "99.png"], stream=False)
        lines = (f"/image {tmp_path}/9.png", "Why", "/new", f"/image {tmp_path}/99.png", "How", "And")
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
        session.converse()
        with pytest.raises(ConfigError, match="a raw prompt has no place for what experts say: leave out --raw or"):
            session.answer("Is it?", raw=True, images=[tmp_path / "9.png"])
        with pytest.raises(ConfigError, match="no expert named 'panter'"):
            ChatSession("run", experts="panter")
        broken = ChatSession("run", temperature=0, experts="broken")
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines[:2])))
        broken.converse()
    assert kept == "yes"
    texts = [session.tokenizer.decode(ids).split("### Input:\n")[1:] for ids in model.asked]
    told = [
        f"It was asked: {' '.join([word] * 20)[:64].rpartition(' ')[0]}" for word in ("Is it?", "Why", "How", "And")
    ]
    assert [[text.partition("\n\n### Response")[0] for text in each] for each in texts] == [
        [f"{told[0]}\nThe colour: red 99\nA cat."],
        [told[1]],
        [f"{told[2]}\nThe colour: red 99"],
        [f"{told[3]}\nThe colour: red 99"],
    ]
    said = capsys.readouterr()
    assert "(of 1 experts the texts were cut to 64 tokens)" in said.err
    assert "the expert 'broken' failed" in said.out + said.err


def test_a_text_that_ends_an_answer_is_not_printed_in_pieces(capsys: pytest.CaptureFixture[str]) -> None:
    streamer = chat._streamer(tokenizer("bytes"), ("###",))
    for text in ("a #", "b ##", "# c", "d"):
        streamer.on_finalized_text(text)
    streamer.on_finalized_text("e", stream_end=True)
    assert capsys.readouterr().out == "a #b \n"
