"""OpenAI's API: the official client against a server in this process, and what no client sends."""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn

from tests.serve.world import ask, folders, idle, limits, models, png, talk
from zinit.serve.engine import Engine
from zinit.serve.http import make_app

KEY = "a-key-of-many-letters"
SECRET = "the-password-of-somebody-else"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = Engine(models("anna", "bert", "talk", "eyes"), limits(new_tokens=400, body_bytes=100_000)).start()
    yield made
    made.stop()


@contextmanager
def listening(app: Any) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    with listening(make_app(engine)) as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def chat(client: openai.OpenAI, model: str = "anna", text: str = "Say red.", **more: Any) -> Any:
    messages: Any = more.pop("messages", [{"role": "user", "content": text}])
    return client.chat.completions.create(
        **{"model": model, "messages": messages, "temperature": 0, "max_tokens": 24, **more}
    )


def test_the_models_are_the_base_and_its_adapters(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["base", "anna", "bert", "talk", "eyes"]
    assert client.models.retrieve("bert").id == "bert"
    with pytest.raises(openai.NotFoundError, match="there is no model 'carl'"):
        client.models.retrieve("carl")


@pytest.mark.parametrize("model", ["anna", "bert", "talk", "base"])
def test_a_chat_is_what_the_engine_answers(client: openai.OpenAI, engine: Engine, model: str) -> None:
    (expected,) = ask(engine, model, "Say red.").wait()
    found = chat(client, model)
    assert found.choices[0].message.content == expected.answer
    assert found.choices[0].finish_reason == expected.reason
    assert found.usage.completion_tokens == len(expected.tokens)
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    served = engine._models.get(model)
    assert found.usage.prompt_tokens == len(served.format.prompt(talk("Say red.")))


def test_streams_add_up(client: openai.OpenAI) -> None:
    whole = chat(client, "bert", n=2, seed=3, temperature=1.0)
    texts, reasons = ["", ""], [None, None]
    for chunk in chat(
        client, "bert", n=2, seed=3, temperature=1.0, stream=True, stream_options={"include_usage": True}
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        usage = chunk.usage
    assert texts == [choice.message.content for choice in whole.choices]
    assert texts[0] != texts[1]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_texts_are_continued(client: openai.OpenAI, engine: Engine) -> None:
    given: dict[str, Any] = {"model": "anna", "temperature": 0, "max_tokens": 12}
    found = client.completions.create(prompt=["red", "blue"], logprobs=2, **given)
    expected = [ask(engine, "anna", text, raw=True, max_tokens=12).wait()[0] for text in ("red", "blue")]
    assert [choice.text for choice in found.choices] == [piece.answer for piece in expected]
    assert len(found.choices[1].logprobs.token_logprobs) == 12  # pyright: ignore
    assert len(found.choices[0].logprobs.top_logprobs) == 12  # pyright: ignore
    streamed = client.completions.create(prompt="red", stream=True, **given)
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected[0].answer


def test_a_log_probability_says_where_its_token_begins(client: openai.OpenAI) -> None:
    given: dict[str, Any] = {"model": "anna", "temperature": 0, "max_tokens": 12, "logprobs": 0}
    whole = client.completions.create(prompt=["red", "blue"], **given).choices
    for choice in whole:
        found: Any = choice.logprobs
        assert found.text_offset[0] == 0
        for token, start in zip(found.tokens, found.text_offset, strict=True):
            assert choice.text[start:].startswith(token) or (token == "</s>" and start == len(choice.text))
    parts = [chunk.choices[0] for chunk in client.completions.create(prompt="blue", stream=True, **given)]
    streamed = [start for part in parts if part.logprobs for start in part.logprobs.text_offset or []]
    assert len(parts) > 2
    assert whole[1].logprobs is not None
    assert streamed == whole[1].logprobs.text_offset


def test_stop_texts_and_log_probabilities(client: openai.OpenAI) -> None:
    whole = chat(client).choices[0].message.content
    stop = next(c for c in whole[3:] if c.isascii() and c.isprintable() and c != " ")
    found = chat(client, stop=stop, logprobs=True, top_logprobs=3).choices[0]
    assert found.message.content == whole.partition(stop)[0].strip()
    assert found.finish_reason == "stop"
    for entry in found.logprobs.content:
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob), "greedy: the likeliest"
        assert len(entry.top_logprobs) == 3


def test_images_come_as_data_urls(client: openai.OpenAI, engine: Engine) -> None:
    (expected,) = ask(engine, "eyes", "What is it?", images=[png((250, 0, 0))]).wait()
    url = f"data:image/png;base64,{base64.b64encode(png((250, 0, 0))).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    found = chat(client, "eyes", messages=[{"role": "user", "content": parts}])
    assert found.choices[0].message.content == expected.answer
    assert found.choices[0].message.content != chat(client, "eyes", "What is it?").choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="'anna' takes no images"):
        chat(client, "anna", messages=[{"role": "user", "content": parts}])


def test_several_clients_share_a_batch(client: openai.OpenAI, engine: Engine) -> None:
    expected = {model: chat(client, model, max_tokens=30).choices[0].message.content for model in ("anna", "bert")}
    found: list[tuple[str, str]] = []

    def one(model: str) -> None:
        found.append((model, chat(client, model, max_tokens=30).choices[0].message.content))

    threads = [threading.Thread(target=one, args=(model,)) for model in [*expected] * 5]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 10
    assert all(expected[model] == text for model, text in found)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools are not supported: leave tools out"),
    ({"presence_penalty": 0.5}, "presence_penalty is not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
    ({"max_tokens": 401}, "max_tokens is 401; this server allows 400"),
    ({"max_completion_tokens": 401}, "max_tokens is 401"),
    ({"temperature": 3}, "temperature: Input should be less than or equal to 2"),
    ({"top_p": 0}, "top_p: Input should be greater than 0"),
    ({"n": 65}, "65 answers are more than the 64 allowed"),
    ({"stop": ["a", ""]}, "an empty text cannot end an answer"),
    ({"stop": ["a", "b" * 501]}, "a text that ends an answer has at most 500 characters; one has 501"),
    ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
    ({"extra_body": {"beams": 2}}, "beams: Extra inputs are not permitted"),
    ({"messages": []}, "messages: List should have at least 1 item"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "tools are not supported"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "the user's first and last; got assistant"),
    ({"text": "x" * 2000}, "there is room for 511"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]},
     "an image is a data URL"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_not_supported_is_refused(client: openai.OpenAI, given: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        chat(client, **given)


def test_the_longest_text_that_ends_an_answer_is_taken(client: openai.OpenAI) -> None:
    assert chat(client, stop="b" * 500).choices[0].message.content == chat(client).choices[0].message.content
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, stop="b" * 501)
    assert refused.value.param == "stop"


def test_what_means_nothing_is_taken(client: openai.OpenAI) -> None:
    neutral: dict[str, Any] = {"presence_penalty": 0, "logit_bias": {}, "tools": [], "user": "me", "store": False}
    found = chat(client, **neutral, response_format={"type": "text"})
    assert found.choices[0].message.content == chat(client).choices[0].message.content


# --- without a client -------------------------------------------------------------------------------------------------


def call(
    app: Any, method: str, path: str, body: bytes = b"", *, seen: dict[str, str] | None = None, **headers: str
) -> tuple[int, bytes]:
    """One request to an application, without a socket; the headers of the answer go into ``seen``."""
    sent: list[Any] = []
    pieces = [body[start : start + 4096] for start in range(0, len(body), 4096)] or [b""]
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages[-1]["more_body"] = False

    async def receive() -> Any:
        if messages:
            return messages.pop(0)
        await asyncio.sleep(3600)

    async def send(message: Any) -> None:
        sent.append(message)

    given = {"host": "localhost:1", "content-type": "application/json", **headers}
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http", "server": ("x", 1),
        "client": ("y", 2),
        "headers": [(name.replace("_", "-").encode(), text.encode()) for name, text in given.items()],
    }  # fmt: skip
    with suppress(RuntimeError):  # of a fault, once it is answered
        asyncio.run(app(scope, receive, send))
    if seen is not None:
        seen |= {name.decode(): text.decode() for name, text in sent[0]["headers"]}
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def test_health_and_metrics(client: openai.OpenAI, engine: Engine) -> None:
    app = make_app(engine)
    body = json.dumps({"model": "bert", "messages": [{"role": "user", "content": "x"}], "max_tokens": 5}).encode()
    status, found = call(app, "POST", "/v1/chat/completions", body)
    assert status == 200
    usage = json.loads(found)["usage"]
    assert idle(engine)
    assert call(app, "GET", "/health") == (200, b'{"status":"ok"}')
    lines = call(app, "GET", "/metrics")[1].decode().splitlines()
    assert 'zinit_requests_total{end="answered",model="bert"} 1.0' in lines
    assert f'zinit_generated_tokens_total{{model="bert"}} {usage["completion_tokens"]}.0' in lines
    assert f'zinit_prompt_tokens_total{{model="bert"}} {usage["prompt_tokens"]}.0' in lines
    assert "zinit_models 5.0" in lines
    assert "zinit_running 0.0" in lines


def test_keys_hosts_and_sizes(engine: Engine, tmp_path: Path) -> None:
    app = make_app(engine, keys=frozenset({KEY, "another-key-of-letters"}), hosts=frozenset({"localhost"}))
    with_key = {"authorization": f"Bearer {KEY}"}
    assert call(app, "GET", "/v1/models")[0] == 401
    assert call(app, "GET", "/metrics")[0] == 401
    assert call(app, "GET", "/v1/models", authorization="Bearer another")[0] == 401
    assert call(app, "GET", "/v1/models", **with_key)[0] == 200
    assert call(app, "GET", "/health")[0] == 200
    assert call(app, "GET", "/health", host="evil.example:1")[0] == 421
    for headers in ({}, {"content_length": "100"}):  # one that lies
        status, body = call(app, "POST", "/v1/chat/completions", b"[" * 100_001, **with_key, **headers)
        assert (status, b"more than 100,000 bytes" in body) == (413, True)
    assert call(app, "POST", "/v1/chat/completions", b"{}", content_length="999999", **with_key)[0] == 413
    load = json.dumps({"id": "new", "source": str(folders()["anna"])}).encode()
    assert call(make_app(engine), "POST", "/admin/adapters", load)[0] == 403
    assert call(app, "POST", "/admin/adapters", load, **with_key)[0] == 201
    assert b'"new"' in call(app, "GET", "/v1/models", **with_key)[1]
    assert call(app, "DELETE", "/admin/adapters/new", **with_key)[0] == 200
    assert call(app, "DELETE", "/admin/adapters/new", **with_key)[0] == 404
    nowhere = json.dumps({"id": "new", "source": str(tmp_path / "nowhere")}).encode()
    status, body = call(app, "POST", "/admin/adapters", nowhere, **with_key)
    assert (status, b"nowhere" in body, b"the server's log says why" in body) == (400, False, True)


def test_a_fault_shows_nothing_of_itself(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: Any, **__: Any) -> None:
        raise RuntimeError("/home/somebody/secret")

    monkeypatch.setattr(engine, "_submit", fault)
    app = make_app(engine)
    body = json.dumps({"model": "bert", "messages": [{"role": "user", "content": "x"}]}).encode()
    status, sent = call(app, "POST", "/v1/chat/completions", body)
    assert (status, b"secret" in sent, b"the server has a fault; its log says more" in sent) == (500, False, True)


WORDS = [
    SECRET[:3],
    None,
    True,
    -1,
    0,
    3,
    1e400,
    [],
    {},
    "anna",
    "user",
    {"a": [[]]},
    "\x00",
    "data:image/png;base64,AAAA",
]


def mutated(draw: random.Random) -> bytes:
    """A body that is nearly right."""
    body: Any = {
        "model": "bert", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "max_tokens": 2,
        "temperature": 0.5, "stop": ["x"], "n": 1, "stream": False, "logprobs": True, "seed": 1, "prompt": "hi",
    }  # fmt: skip
    del body[draw.choice(["messages", "prompt"])]
    for _ in range(draw.randint(0, 3)):
        place: Any = body
        while isinstance(place, dict | list) and place:
            key = draw.choice(list(place)) if isinstance(place, dict) else draw.randrange(len(place))
            if not isinstance(place[key], dict | list) or not place[key] or draw.random() < 0.4:
                if isinstance(place, dict) and draw.random() < 0.3:
                    place[str(draw.choice(WORDS))] = place.pop(key)
                else:
                    place[key] = copy.deepcopy(draw.choice(WORDS))
                break
            place = place[key]
    text = json.dumps(body).encode()
    if draw.random() < 0.3:
        at = draw.randrange(len(text))
        text = text[:at] + draw.randbytes(draw.randint(0, 3)) + text[at + draw.randint(0, 4) :]
    return draw.choice([text] * 8 + [b"[" * 50_000, text.replace(b"hi", b"\\ud800"), text * 2, b""])


def test_malformed_bodies_are_refused_in_one_document(engine: Engine) -> None:
    """No fault, nothing of what somebody else asks at the time."""
    draw, app = random.Random(0), make_app(engine)
    secret = ask(engine, "base", SECRET, max_tokens=400)
    statuses = []
    for _ in range(int(os.environ.get("ZINIT_FUZZ", "100"))):
        path = draw.choice(["/v1/chat/completions", "/v1/completions"])
        status, answer = call(app, "POST", path, mutated(draw))
        statuses.append(status)
        assert status < 500, answer
        assert SECRET.encode() not in answer
        if status != 200:
            assert set(json.loads(answer)["error"]) == {"message", "type", "param", "code"}
            assert b"Traceback" not in answer
            assert b"/zinit" not in answer
    assert 0.05 < statuses.count(200) / len(statuses) < 0.7
    assert secret.ticket is not None
    secret.ticket.cancel()


def test_clients_that_vanish_leave_nothing(engine: Engine, address: str) -> None:
    host, _, port = address.removeprefix("http://").partition(":")
    for number in range(40):
        body = json.dumps(
            {
                "model": "anna",
                "messages": [{"role": "user", "content": "x"}],
                "max_tokens": 400,
                "stream": number % 2 == 0,
            }
        )
        connection = socket.create_connection((host, int(port)))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        if number % 4 == 0:
            connection.recv(64)
        connection.close()
    assert idle(engine)
    assert engine.gauges() == {"waiting": 0, "running": 0, "models": 5}
