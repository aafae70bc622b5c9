"""Talking to a tuned causal language model: one answer, or a conversation."""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from zinit.errors import ConfigError, first_line, printable
from zinit.models.room import positions
from zinit.runs.build import load_run
from zinit.runs.directory import read_finished_run
from zinit.tasks import TASKS
from zinit.tasks.base import Task
from zinit.ui.console import say


class ChatSession:
    """A tuned model, its tokenizer and how to sample from it.

    Args:
        run_dir: of a finished run.
        temperature: 0 is greedy. Paper: 0.1.
        top_p: nucleus sampling. Paper: 0.75.
        max_new_tokens: longest answer.
        seed: of the sampling.
        base: switch the adapter off.

    Raises:
        ConfigError: if the run's task does not generate text.
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
    ) -> None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = accelerator or torch.device("cpu")
        config, _ = read_finished_run(run_dir)
        self.task: type[Task] = TASKS.get(config.task)
        if not self.task.generates:
            raise ConfigError(f"the run in {run_dir} is of the task {config.task!r}, which does not generate text.")
        _, model, self.tokenizer, self.handle = load_run(run_dir, device)
        self.model: Any = model.eval()
        self.device, self.base = device, base
        sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            sampling |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
        self.generation = self._generation(sampling)
        torch.manual_seed(seed)

    def _generation(self, sampling: dict[str, Any]) -> Any:
        """The model's own configuration under what the user says; which of its entries count is printed."""
        from zinit.models.generation import conversational

        eos = self.tokenizer.eos_token_id
        try:
            config, used, ignored = conversational(self.model, eos_token_id=eos, **sampling)
        except (ValueError, TypeError) as error:
            raise _bad_generation(error) from error
        self.used = used
        parts = [f"uses {', '.join(f'{name}={value!r}' for name, value in used.items())}"] if used else []
        parts += [f"does not use {', '.join(ignored)}"] if ignored else []
        if parts:
            say(f"(of the model's generation settings this {'; it '.join(parts)})", error=True)
        return config

    def answer(self, instruction: str, *, input: str = "", raw: bool = False, stream: bool = True) -> str:
        """The answer to one instruction; streamed to the standard output while it is generated.

        Args:
            instruction: what to do.
            input: further context.
            raw: continue ``instruction`` as it is, without the template.
            stream: print while generating.
        """
        return self._complete(instruction if raw else self.task.format_prompt(instruction, input), stream)

    def converse(self) -> None:
        """Reads instructions from the standard input and answers each, all earlier turns in view."""
        turns: list[tuple[str, str]] = []
        interactive = sys.stdin.isatty()
        if interactive:
            print("Ask something. /new starts over, /quit ends.")
        while True:
            try:
                line = input("> " if interactive else "").strip()
            except (EOFError, KeyboardInterrupt):
                break
            if line == "/quit":
                break
            if line == "/new":
                turns = []
            elif line.startswith("/"):
                print("(only /new and /quit are commands)")
            elif line:
                try:
                    turns.append((line, self._complete(self.task.format_conversation(turns, line), stream=True)))
                except ConfigError as error:  # no reason to lose the conversation
                    say(f"({error} Say /new for a new one.)")
                except KeyboardInterrupt:
                    print("\n(stopped; this answer is forgotten)")

    @torch.no_grad()
    def _complete(self, prompt: str, stream: bool) -> str:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ConfigError("the prompt is not valid UTF-8 text.") from error
        ids = self.task.encode_prompt(self.tokenizer, prompt)
        if not ids:
            raise ConfigError("the prompt is empty; say something.")
        room = positions(self.model)
        if room is not None and len(ids) >= room:
            raise ConfigError(f"the prompt has {len(ids)} tokens, but the model has room for {room}.")
        generation = copy.copy(self.generation)
        if room is not None:
            generation.max_new_tokens = min(generation.max_new_tokens, room - len(ids))
        inputs = torch.tensor([ids], device=self.device)
        streamer = _streamer(self.tokenizer) if stream else None
        try:
            with self.handle.disabled() if self.base else nullcontext():
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
            raise _bad_generation(error) from error
        return self.tokenizer.decode(generated[0, len(ids) :], skip_special_tokens=True).strip()


def _bad_generation(error: Exception) -> ConfigError:
    return ConfigError(
        f"the settings in the model's generation_config.json cannot be used: {first_line(error)} Correct the file, or "
        f"remove it."
    )


def _streamer(tokenizer: Any) -> Any:
    """Prints an answer while it is generated, cleaned: what a model says is text of any origin."""
    from transformers import TextStreamer

    class SafeStreamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(printable(text), stream_end)

    return SafeStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
