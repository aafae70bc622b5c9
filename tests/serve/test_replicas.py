"""`zinit serve` behind Ray Serve: the server of one replica, the deployment file, and one in Ray for real."""

from __future__ import annotations

import copy
import importlib
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

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
def cluster() -> Iterator[str]:
    """Ray on this machine; the address that deployment files are sent to."""
    ray = pytest.importorskip("ray", reason="needs the package ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        found = ray.init("local", num_cpus=4, include_dashboard=True, dashboard_port=free_port(), log_to_driver=False)
        yield f"http://{found.dashboard_url}"
        importlib.import_module("ray.serve").shutdown()
        ray.shutdown()


def serve_command(*arguments: str, address: str) -> str:
    """What Ray's own command says."""
    command = [str(Path(sys.executable).with_name("serve")), *arguments, "--address", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def until_running(address: str) -> dict[str, int]:
    """How many replicas are in which state, once the application runs."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        found = yaml.safe_load(serve_command("status", address=address))["applications"].get("zinit", {})
        if found.get("status") == "RUNNING":
            return found["deployments"]["zinit"]["replica_states"]
        assert found.get("status") != "DEPLOY_FAILED", found
        time.sleep(1)
    raise AssertionError("the application does not run")


def answered(address: str) -> dict[str, int]:
    """{a replica's time of start: how many requests it has answered}; nothing of one that has not been asked yet."""
    asked = urllib.request.Request(f"{address}/metrics", headers={"authorization": f"Bearer {KEY}"})
    text = urllib.request.urlopen(asked, timeout=60).read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    starts = [sample.value for sample in samples if sample.name == "zinit_requests_created"]
    count = int(sum(sample.value for sample in samples if sample.name == "zinit_requests_total"))
    return {str(min(starts)): count} if starts else {}


@pytest.mark.integration
def test_the_deployment_file_gives_two_replicas_that_answer_alike(
    cluster: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    engine = Engine(models("bert"), limits()).start()
    (expected,) = ask(engine, "bert", "Say red.", max_tokens=8).wait()
    engine.stop()
    document = copy.deepcopy(DOCUMENT)
    document["http_options"] = {"host": "127.0.0.1", "port": free_port()}
    document["applications"][0]["args"] = settings
    (tmp_path / "deployment.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    serve_command("deploy", str(tmp_path / "deployment.yaml"), address=cluster)
    assert until_running(cluster) == {"RUNNING": 2}
    address = f"http://127.0.0.1:{document['http_options']['port']}"
    with pytest.raises(openai.AuthenticationError, match="a key is needed"):
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0).models.list()
    client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
    assert [model.id for model in client.models.list()] == ["base", "anna", "bert"]
    seen: dict[str, int] = {}
    for _ in range(60):  # which replica answers is chosen anew each time
        assert chat(client, "bert", max_tokens=8).choices[0].message.content == expected.answer
        seen |= answered(address)
        if len(seen) > 1 and all(seen.values()):
            break
    assert len(seen) == 2
    chunks = list(chat(client, "bert", max_tokens=8, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.answer
    with pytest.raises(openai.NotFoundError, match="there is no model 'carl'"):
        chat(client, "carl", max_tokens=8)
