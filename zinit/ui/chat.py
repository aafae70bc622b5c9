"""Talking to a tuned causal language model: one answer, or a conversation."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from zinit.adapter.encoding import Features, encode
from zinit.adapter.handle import Handle
from zinit.data.conversations import Conversation, Round
from zinit.data.images import read_image
from zinit.errors import ConfigError, DataError, ZinitError, printable
from zinit.files import local_path
from zinit.models.room import positions
from zinit.runs.build import load_saved, run_expert
from zinit.runs.directory import SavedRun
from zinit.runs.images import open_retrieval
from zinit.tasks import TASKS
from zinit.tasks.base import Task
from zinit.tasks.chat import ChatFormat, cut_at
from zinit.tasks.experts import Experts, context_lines
from zinit.tasks.settings import EXPERT_TOKENS
from zinit.ui.console import say
from zinit.validation import split_at_commas


class ChatSession:
    """A tuned model, its tokenizer and how to sample from it.

    Args:
        run_dir: of a run, or of a checkpoint in it.
        temperature: 0 is greedy. Paper: 0.1.
        top_p: nucleus sampling. Paper: 0.75.
        max_new_tokens: longest answer.
        seed: of the sampling.
        base: switch the adapter off.
        system: what the assistant is told before all else.
        experts: what writes about images into the input field, as ``task.experts`` has it; empty for none, None as the
            run was made.
        index: folder of an index that what the adapter sees is mixed with; None mixes nothing.
        retrieval: how, see `zinit.runs.images.open_retrieval`.

    Raises:
        ConfigError: if the run's task does not generate text, or the index is not for its adapter.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        temperature: float = 0.1,
        top_p: float = 0.75,
        max_new_tokens: int = 256,
        seed: int = 0,
        base: bool = False,
        system: str = "",
        experts: str | None = None,
        index: str | None = None,
        retrieval: Sequence[str] = (),
    ) -> None:
        if base and index is not None:
            raise ConfigError("an index mixes what the adapter sees, and the adapter is off (--frozen). Leave one out.")
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = accelerator or torch.device("cpu")
        run = SavedRun.read(run_dir)
        config = run.config
        self.task: type[Task] = TASKS.get(config.task)
        if not self.task.generates:
            raise ConfigError(f"the run in {run_dir} is of the task {config.task!r}, which does not generate text.")
        self.retrieval = None if index is None else open_retrieval(index, retrieval)  # before the model is loaded
        if run.note:
            say(f"({run.note})", error=True)
        built = load_saved(run, device, base=base)
        self.adapted, self.tokenizer = built.adapted, built.processor
        self.model: Any = built.adapted.model.eval()
        self.device, self.base, self.system = device, base, system
        if self.retrieval is not None:
            self.retrieval.check(built.adapted.handle)
        words = getattr(config.options, "experts", ()) if experts is None else split_at_commas(experts)
        self.experts = Experts([run_expert(each, device=device) for each in words])
        self.expert_tokens = getattr(config.options, "expert_tokens", EXPERT_TOKENS)
        self.format: ChatFormat = self.task.chat_format(self.tokenizer, config.options)
        self.generation = self._generation(max_new_tokens, temperature, top_p)
        torch.manual_seed(seed)

    def _generation(self, max_new_tokens: int, temperature: float, top_p: float) -> Any:
        """The model's own configuration under what the user says; which of its entries count is printed."""
        from zinit.models.generation import conversational, describe_own, sampled

        sampling = sampled(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        config, self.used, ignored = conversational(self.model, eos_token_id=self.tokenizer.eos_token_id, **sampling)
        if text := describe_own(self.used, ignored):
            say(f"({text})", error=True)
        config.eos_token_id = list(dict.fromkeys([*config.eos_token_id, *self.format.stop_tokens]))
        config.stop_strings = [*(config.stop_strings or ()), *self.format.stop_strings] or None
        return config

    def answer(
        self,
        instruction: str,
        *,
        input: str = "",
        images: Sequence[str | Path] = (),
        raw: bool = False,
        stream: bool = True,
    ) -> str:
        """The answer to one instruction; streamed to the standard output while it is generated.

        Args:
            instruction: what to do.
            input: further context.
            images: files that the instruction is about.
            raw: continue ``instruction`` as it is, without the template.
            stream: print while generating.

        Raises:
            ConfigError: if the run takes no images or no system text, or the prompt is too long.
            DataError: if an image cannot be read.
        """
        if raw and (self.system or (images and self.experts.experts)):
            kind, option = ("a system text", "--system") if self.system else ("what experts say", "the experts")
            raise ConfigError(f"a raw prompt has no place for {kind}: leave out --raw or {option}.")
        shown = [self._read(image) for image in images]
        if self.retrieval is not None and not shown:
            raise ConfigError("--index mixes what the adapter is shown, and nothing is: name a file, or leave it out.")
        rounds = [Round(question=instruction, input=input)]
        ids = self._encode_raw(instruction) if raw else self._encode(rounds, shown)
        return self._complete(ids, shown, stream)[0]

    def reply(self, talk: Conversation, *, seed: int) -> tuple[str, int]:
        """The answer to the last round of a conversation, and its tokens.

        Args:
            talk: as a record has it.
            seed: of the sampling.

        Raises:
            ConfigError: if the run takes no images, or the prompt is too long.
        """
        if talk.images and not self._takes_images:
            raise ConfigError("the run is language-only: its adapter takes no images.")
        _check_texts(talk.system, *(text for each in talk.rounds for text in (each.question, each.input)))
        torch.manual_seed(seed)
        files = bool(talk.images) and self.sense != "image"
        shown = [image if files else read_image(image) for image in talk.images]
        return self._complete(self.format.prompt(talk), shown, stream=False)

    def converse(self, images: Sequence[str | Path] = ()) -> None:
        """Reads instructions from the standard input and answers each, all earlier turns and images in view.

        Args:
            images: files that are shown from the start.
        """
        rounds: list[Round] = []
        shown = [self._read(image) for image in images]
        self._encode([Round(question="?")])  # what the run cannot be told is said now
        interactive = sys.stdin.isatty()
        if isinstance(sys.stdin, io.TextIOWrapper):  # one line that is no text ends no conversation, see `_check_texts`
            sys.stdin.reconfigure(errors="surrogateescape")
        if interactive:
            print("Ask something. /new starts over, /image FILE shows an image, /quit ends.")
        while True:
            try:
                line = input("> " if interactive else "").strip()
            except (EOFError, KeyboardInterrupt):
                break
            command, _, rest = line.partition(" ")
            if line == "/quit":
                break
            if line == "/new":
                rounds, shown = [], []
            elif command == "/image":
                try:
                    shown.append(self._read(rest.strip()))
                except ZinitError as error:
                    say(f"({error})")
            elif line.startswith("/"):
                print("(only /new, /image FILE and /quit are commands)")
            elif line:
                try:
                    ids = self._encode([*rounds, Round(question=line)], shown)
                    rounds.append(Round(question=line, answer=self._complete(ids, shown, stream=True)[0]))
                except (ConfigError, DataError) as error:  # no reason to lose the conversation
                    say(f"({error} Say /new for a new one.)")
                except KeyboardInterrupt:
                    print("\n(stopped; this answer is forgotten)")

    @property
    def _takes_images(self) -> bool:
        return self.adapted.handle is not None and "context" in self.adapted.handle.shared

    @property
    def sense(self) -> str:
        """What the adapter's encoder takes: "image", "audio", "video" or "vector"."""
        handle = self.adapted.handle
        return "image" if handle is None or handle.encoder is None else handle.get_encoder().modality

    def _read(self, image: str | Path) -> Any:
        """An image from a file; for encoders of sound or video the file itself, which they read."""
        if not self._takes_images and not self.experts.experts:
            raise ConfigError(
                f"the run is language-only: its adapter takes no images, but was given {image}. Train one that does "
                f"(--method v1-multimodal), or leave the image out."
            )
        if self.base and not self.experts.experts:
            say(f"({image} is not seen: images reach the model by the adapter, which is off)", error=True)
        file = local_path(image)
        if self.sense == "image":
            return read_image(file)
        if self.experts.experts:
            raise ConfigError(f"experts read images, and the run's encoder takes {self.sense}. Leave --experts out.")
        if not file.exists():
            raise DataError(f"there is no file {file}.")
        return file

    def _features(self, handle: Handle, images: Sequence[Any]) -> Features:
        """What the adapter's encoder makes of a conversation's images, mixed with the index where there is one."""
        layers = getattr(handle.shared["context"], "layers", 0)
        features = encode(handle.get_encoder(), [list(images)], layers=layers)
        return features if self.retrieval is None else self.retrieval(features)

    def _encode(self, rounds: Sequence[Round], images: Sequence[Any] = ()) -> list[int]:
        """The prompt, with what experts say about the images beside the last question."""
        _check_texts(self.system, *(text for each in rounds for text in (each.question, each.input)))
        talk = Conversation(rounds=tuple(rounds), system=self.system)
        if images and self.experts.experts:
            (said,) = self.experts([(images, rounds[-1].question)])
            lines, counts = context_lines(said, self.tokenizer, self.expert_tokens)
            if cut := sum(count for name, count in counts.items() if name.endswith("_cut")):
                say(f"(of {cut} experts the texts were cut to {self.expert_tokens} tokens)", error=True)
            talk = talk.with_context(lines)
        return self.format.prompt(talk)

    def _encode_raw(self, prompt: str) -> list[int]:
        _check_texts(prompt)
        return self.task.encode_prompt(self.tokenizer, prompt)

    @torch.no_grad()
    def _complete(self, ids: list[int], images: Sequence[Any], stream: bool) -> tuple[str, int]:
        if not ids:
            raise ConfigError("the prompt is empty; say something.")
        room = positions(self.model)
        if room is not None and len(ids) >= room:
            raise ConfigError(f"the prompt has {len(ids)} tokens, but the model has room for {room}.")
        generation = copy.copy(self.generation)
        if room is not None:
            generation.max_new_tokens = min(generation.max_new_tokens, room - len(ids))
        inputs = torch.tensor([ids], device=self.device)
        streamer = _streamer(self.tokenizer, tuple(self.format.stop_strings)) if stream else None
        with ExitStack() as scopes:
            if self.base:
                scopes.enter_context(self.adapted.disabled())
            elif images and self._takes_images and self.adapted.handle is not None:
                scopes.enter_context(self.adapted.handle.given(features=self._features(self.adapted.handle, images)))
            try:
                generated = self.model.generate(
                    input_ids=inputs,
                    attention_mask=torch.ones_like(inputs),
                    streamer=streamer,
                    generation_config=generation,
                    tokenizer=self.tokenizer,  # which stop_strings need
                )
            except (ValueError, TypeError, IndexError, RuntimeError) as error:
                if not self.used:
                    raise
                from zinit.models.generation import unusable

                raise unusable(error) from error
        new = generated[0, len(ids) :]
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        return cut_at(text, self.format.stop_strings).strip(), len(new)


def _check_texts(*texts: str) -> None:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise ConfigError("the prompt is not valid UTF-8 text.") from error


def _streamer(tokenizer: Any, ends: tuple[str, ...]) -> Any:
    """Prints an answer while it is generated, cleaned: what a model says is text of any origin.

    Args:
        tokenizer: of the model.
        ends: texts that end an answer; none of them is printed.
    """
    from transformers import TextStreamer

    class SafeStreamer(TextStreamer):
        held, over = "", False  # what may become one of the ends; whether one came

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            text, self.held = "" if self.over else self.held + text, ""
            before = cut_at(text, ends)
            self.over = self.over or before != text
            if not self.over and not stream_end:
                kept = max((n for end in ends for n in range(len(end)) if text.endswith(end[:n])), default=0)
                before, self.held = text[: len(text) - kept], text[len(text) - kept :]
            super().on_finalized_text(printable(before), stream_end)

    return SafeStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
