"""`zinit serve` behind Ray Serve: the server of one replica, the deployment file, and one in Ray for real."""

from __future__ import annotations

import importlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from tests.serve.test_http import KEY, call, chat
from tests.serve.world import ask, folders, limits, models
from tests.shared import ROOT
from zinit.errors import ConfigError
from zinit.serve.engine import Engine
from zinit.serve.replicas import Settings, make_server

DOCUMENT = yaml.safe_load((ROOT / "configs" / "ray-serve.yaml").read_text(encoding="utf-8"))


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "keys").write_text(KEY)
    sources = [f"{name}={folders()[name]}" for name in ("anna", "bert")]
    return {"sources": sources, "api_key_file": str(tmp_path / "keys"), "max_tokens": 8}


def test_a_replica_answers_with_a_key_and_keeps_its_adapters(settings: dict[str, Any]) -> None:
    app = make_server(Settings.from_dict(settings))
    with_key = {"authorization": f"Bearer {KEY}"}
    ask = {"model": "bert", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    assert call(app, "POST", "/v1/chat/completions", json.dumps(ask).encode())[0] == 401
    status, found = call(app, "POST", "/v1/chat/completions", json.dumps(ask).encode(), **with_key)
    assert (status, json.loads(found)["model"]) == (200, "bert")
    status, found = call(app, "POST", "/v1/chat/completions", json.dumps({**ask, "max_tokens": 9}).encode(), **with_key)
    assert (status, b"this server allows 8" in found) == (400, True)
    for method, path, body in (
        ("POST", "/admin/adapters", json.dumps({"id": "new", "source": str(folders()["talk"])}).encode()),
        ("DELETE", "/admin/adapters/anna", b""),
    ):
        status, found = call(app, method, path, body, **with_key)
        assert (status, b"loaded by the deployment file, for all replicas" in found) == (403, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": []}, "sources must be one or more runs or adapters"),
        ({"api_key_file": None}, "the deployment's args needs api_key_file"),
        ({"batsh": 3}, "has no setting 'batsh'. Did you mean 'batch'"),
        ({"queue": 0}, "queue must be"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str, settings: dict[str, Any]) -> None:
    changed = {name: value for name, value in {**settings, **change}.items() if value is not None}
    with pytest.raises(ConfigError) as caught:
        Settings.from_dict(changed)
    assert message in str(caught.value)


def test_the_deployment_file_is_of_this_server() -> None:
    (application,) = DOCUMENT["applications"]
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    assert Settings.from_dict(application["args"]).max_tokens == 1024
    assert [deployment["name"] for deployment in application["deployments"]] == ["zinit"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="needs the package ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        yield ray
        importlib.import_module("ray.serve").shutdown()
        ray.shutdown()


@pytest.mark.integration
def test_a_replica_of_ray_answers_as_a_server(cluster: Any, settings: dict[str, Any]) -> None:
    from ray import serve
    from ray.serve.schema import ServeDeploySchema

    from zinit.serve.replicas import app

    engine = Engine(models("bert"), limits()).start()
    (expected,) = ask(engine, "bert", "Say red.", max_tokens=8).wait()
    engine.stop()
    given = {**DOCUMENT, "http_options": {"host": "127.0.0.1", "port": free_port()}}
    ServeDeploySchema.model_validate(given)
    serve.start(http_options=given["http_options"])
    deployment = app(settings)
    serve.run(deployment, name="zinit", route_prefix="/")
    address = f"http://127.0.0.1:{given['http_options']['port']}/v1"
    with pytest.raises(openai.AuthenticationError, match="a key is needed"):
        openai.OpenAI(base_url=address, api_key="none", max_retries=0).models.list()
    client = openai.OpenAI(base_url=address, api_key=KEY, max_retries=0)
    assert [model.id for model in client.models.list()] == ["base", "anna", "bert"]
    for _ in range(4):
        assert chat(client, "bert", max_tokens=8).choices[0].message.content == expected.answer
    chunks = list(chat(client, "bert", max_tokens=8, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.answer
    with pytest.raises(openai.NotFoundError, match="there is no model 'carl'"):
        chat(client, "carl", max_tokens=8)
