"""The bodies of requests, as OpenAI's API has them; what is not supported is refused by name."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from zinit.serve.requests import Refused, Sampling, Turn

MOST_STOPS, LONGEST_STOP = 16, 500  # texts, and characters of each: all are compared at every token
Text = Annotated[str, Field(max_length=2_000_000)]
NEUTRAL = {  # settings that are not supported, and the values that mean nothing
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "logit_bias": ({}, None),
    "best_of": (1, None),
    "echo": (False, None),
    "suffix": ("", None),
    "modalities": (["text"], None),
    "response_format": ({"type": "text"}, None),
    "store": (False, None),
    "tool_choice": ("none", "auto", None),
    "parallel_tool_calls": (True, False, None),
    "service_tier": ("auto", "default", None),
    "tools": ([], None),
    "functions": ([], None),
    "function_call": ("none", "auto", None),
    "reasoning_effort": ("none", None),
}
TOOLS = ("tools", "functions", "tool_calls", "tool_choice", "function_call")


class Body(BaseModel):
    """A JSON object without unknown fields."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=False, hide_input_in_errors=True)


def _same(given: Any, value: Any) -> bool:
    return given is value if isinstance(given, bool) or isinstance(value, bool) else given == value


class StreamOptions(Body):
    """What is streamed besides."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Asking(Body):
    """What both ways of asking share.

    Attributes:
        user: who asks; not looked at, like ``metadata`` and ``safety_identifier``.
    """

    model: Annotated[str, Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, values: Any) -> Any:
        """Leaves out what means nothing; what would mean something is refused."""
        if not isinstance(values, dict):
            return values
        kept = dict(values)
        for name, allowed in NEUTRAL.items():
            if name in kept and not any(_same(kept[name], value) for value in allowed):
                what = "tools are not supported" if name in TOOLS else f"{name} is not supported"
                raise Refused(f"{what}: leave {name} out.", code="unsupported", parameter=name)
            kept.pop(name, None)
        return kept

    def sampling(self, logprobs: int | None, *, most: int, longest: int | None = None) -> Sampling:
        """How the answers are generated.

        Args:
            logprobs: see `Sampling`.
            most: tokens of an answer that the server allows.
            longest: tokens of an answer as the request has it, where not ``max_tokens``.
        """
        asked = self.max_tokens if longest is None else longest
        if asked is not None and asked > most:
            raise Refused(f"max_tokens is {asked}; this server allows {most}.", parameter="max_tokens")
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if not all(stops):
            raise Refused("an empty text cannot end an answer.", parameter="stop")
        if (length := max(map(len, stops), default=0)) > LONGEST_STOP:
            raise Refused(
                f"a text that ends an answer has at most {LONGEST_STOP} characters; one has {length}.",
                parameter="stop",
            )
        default = Sampling()
        return Sampling(
            max_tokens=min(default.max_tokens, most) if asked is None else asked,
            temperature=default.temperature if self.temperature is None else self.temperature,
            top_p=default.top_p if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=tuple(stops),
            n=self.n or 1,
            logprobs=logprobs,
        )


class ImageUrl(Body):
    """Where an image is; ``detail`` is not looked at: an encoder has one resolution."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class TextPart(Body):
    """A part of a message that is text."""

    type: Literal["text"]
    text: Text


class ImagePart(Body):
    """A part of a message that is an image."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Body):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(min_length=1)]
    name: None = None
    refusal: None = None

    @model_validator(mode="before")
    @classmethod
    def _no_tools(cls, values: Any) -> Any:
        if isinstance(values, dict) and (values.get("tool_calls") or values.get("role") in ("tool", "function")):
            raise Refused("tools are not supported: leave such messages out.", code="unsupported", parameter="messages")
        if isinstance(values, dict):
            return {name: value for name, value in values.items() if name != "tool_calls"}
        return values

    def turn(self) -> Turn:
        """What is said."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return Turn(role=role, text=self.content)
        images = [_image(part.image_url.url) for part in self.content if isinstance(part, ImagePart)]
        if images and role != "user":
            raise Refused(f"a message of the {role} has no images.", parameter="messages")
        text = "".join(part.text for part in self.content if isinstance(part, TextPart))
        return Turn(role=role, text=text, images=images)


def _image(url: str) -> bytes:
    start, comma, data = url.partition(",")
    if not (start.startswith("data:image/") and start.endswith(";base64") and comma):
        raise Refused(
            "an image is a data URL (data:image/png;base64,...); others are not fetched.", parameter="messages"
        )
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused("an image holds no valid base64.", parameter="messages") from error


class ChatBody(Asking):
    """A chat."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def turns(self) -> list[Turn]:
        """The messages."""
        return [message.turn() for message in self.messages]

    def to_sampling(self, most: int) -> Sampling:
        """See `Asking.sampling`."""
        if self.top_logprobs and not self.logprobs:
            raise Refused("top_logprobs needs logprobs: true.", parameter="top_logprobs")
        return self.sampling(
            (self.top_logprobs or 0) if self.logprobs else None, most=most, longest=self.max_completion_tokens
        )


class CompletionBody(Asking):
    """Texts to go on with."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=1000)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    def prompts(self) -> list[str]:
        """The texts."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    def to_sampling(self, most: int) -> Sampling:
        """See `Asking.sampling`."""
        return self.sampling(self.logprobs, most=most)


class AdapterBody(Body):
    """An adapter to load."""

    id: str
    source: str
