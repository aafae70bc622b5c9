"""``zinit serve`` before it serves: names, keys, addresses."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.serve.test_http import call
from tests.serve.world import folders
from zinit.errors import CheckpointError, ConfigError
from zinit.serve import command
from zinit.serve.command import address, bound, check_address, is_loopback, name_sources, read_keys, serve
from zinit.serve.http import make_app
from zinit.serve.source import Source


def test_models_are_named_after_their_folders() -> None:
    assert name_sources(["runs/one/", "two=runs/b", "me/hub"]) == {"one": "runs/one/", "two": "runs/b", "hub": "me/hub"}
    assert name_sources(["a/b=c"]) == {"b=c": "a/b=c"}
    with pytest.raises(ConfigError, match=r"x/a and y/a are both named 'a'. Name them: NAME=FOLDER"):
        name_sources(["x/a", "y/a"])


def test_keys_are_lines_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("abcdefghijklmnop\n\n  0123456789abcdef0  \n")
    assert read_keys(str(file)) == {"abcdefghijklmnop", "0123456789abcdef0"}
    assert read_keys(None) == frozenset()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_keys("~/keys") == read_keys(str(file))
    for text in ("", "short", "abcdefghijklmnop\nshort", "ähnlichwieeinschlüssel"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="expected a key of 16 or more ASCII characters on each line"):
            read_keys(str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(str(tmp_path / "gone"))


def test_others_need_a_key() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "10.0.0.1", "example.org")] == (
        [True] * 3 + [False] * 3
    )
    check_address("127.0.0.1", frozenset())
    check_address("0.0.0.0", frozenset({"key"}))
    with pytest.raises(ConfigError, match=r"--host 0.0.0.0 lets others reach the server: .*--api-key-file FILE"):
        check_address("0.0.0.0", frozenset())


def test_what_cannot_be_served_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with bound("127.0.0.1", 0) as taken:
        port = int(address(taken).rpartition(":")[2])
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1, port {port}: .*take another --port"):
            serve(["runs/x"], port=port)
    with pytest.raises(CheckpointError, match="there is no adapter folder"):
        serve([str(tmp_path / "x")], port=0)
    found = importlib.util.find_spec
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "uvicorn" else found(name))
    with pytest.raises(ConfigError, match=r"zinit serve needs uvicorn. .*pip install -e '.\[serve\]'"):
        serve(["runs/x"])


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """The base with settings for generation beside its weights."""
    return shutil.copytree(folders()["model"], tmp_path / "model")


def test_what_lies_beside_the_base_is_said_or_refused(
    beside: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(command, "listen", lambda *_, **__: None)
    monkeypatch.setattr("zinit.serve.engine.Engine.start", lambda self: self)
    settings = beside / "generation_config.json"
    settings.write_text(json.dumps({"repetition_penalty": 1.5, "min_p": 0.1, "num_beams": 3}))
    serve([str(folders()["anna"])], port=0, model=str(beside))
    said = capsys.readouterr().err
    assert "generation settings this uses min_p=0.1, repetition_penalty=1.5; it does not use num_beams)" in said
    for entries in ({"sequence_bias": [[[900], 1.0]]}, {"bad_words_ids": [["x"]]}):
        settings.write_text(json.dumps(entries))
        with pytest.raises(
            ConfigError, match=r"generation_config\.json cannot be used: .*Correct the file, or remove it"
        ):
            serve([str(folders()["anna"])], port=0, model=str(beside))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"])
def test_the_address_that_is_printed_answers(host: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    statuses: list[int] = []

    def listen(engine: Any, listener: Any, *, keys: frozenset[str], hosts: frozenset[str]) -> None:
        printed = capsys.readouterr().err.rpartition("http://")[2].strip()
        for asked in (printed, "localhost:1", "evil.example:1"):
            statuses.append(call(make_app(engine, keys=keys, hosts=hosts), "GET", "/health", host=asked)[0])

    monkeypatch.setattr(command, "listen", listen)
    monkeypatch.setattr("zinit.serve.engine.Engine.start", lambda self: self)
    serve([str(folders()["anna"])], host=host, port=0)
    assert statuses == [200, 200, 421]


def test_a_source_of_the_home_folder_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no shell has written it out: in requests, and in deployment files."""
    home = folders()["anna"].parent
    monkeypatch.setenv("HOME", str(home))
    source = Source.read("~/anna")
    assert source.run is not None
    assert source.where == str(home / "anna")
    assert Source.read("./gone").where == "./gone"


class Handler(logging.Handler):
    """Somebody else's, such as that of absl, which closes its stream."""

    closed = False

    def close(self) -> None:
        self.closed = True
        super().close()


def test_it_serves_until_it_is_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process: the signal that ends it is sent by the client, whose answer is complete."""
    answers: list[Any] = []
    listen, others = command.listen, Handler()

    def with_client(engine: Any, listener: Any, **more: Any) -> None:
        def talk() -> None:
            client = openai.OpenAI(base_url=f"{address(listener)}/v1", api_key="none")
            asked: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
            answers.append(client.chat.completions.create(model="mine", **asked))
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=talk).start()
        listen(engine, listener, **more)

    monkeypatch.setattr(command, "listen", with_client)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            serve([f"mine={folders()['anna']}"], port=0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert answers[0].choices[0].finish_reason in ("stop", "length")
    assert 0 < answers[0].usage.completion_tokens <= 4
    assert not others.closed
    assert "serving base, mine on http://127.0.0.1:" in capsys.readouterr().err
