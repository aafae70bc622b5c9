"""``zinit serve`` behind Ray Serve: replicas of one server over a cluster, as ``configs/ray-serve.yaml`` says.

Each replica has the base and all adapters. Ray's proxies share the requests out, and can be reached by others: a key is
needed. Adapters do not come and go, as one replica alone would know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import MinLen
from fastapi import FastAPI

from zinit.config import JsonConfig
from zinit.serve.command import name_sources, read_keys
from zinit.serve.http import make_app
from zinit.serve.requests import Limits
from zinit.validation import Name, PositiveFloat, PositiveInt, Words

FIXED = "adapters are loaded by the deployment file, for all replicas: name it there, and deploy it again."


@dataclass(frozen=True, kw_only=True)
class Settings(JsonConfig):
    """The ``args`` of the deployment file; names and defaults are those of ``zinit serve``.

    Args:
        sources: runs, checkpoints and adapters that every machine sees, all of one base; "NAME=FOLDER".
        api_key_file: a file with a key on each line, on every machine.
        model: where the base lies, if elsewhere now.
        template: for adapters without a run.
        batch: answers of a replica that are generated at once.
        queue: answers of a replica that may wait.
        max_tokens: longest answer that may be asked for.
        max_seconds: longest time of a request.
    """

    called = "the deployment's args"

    sources: Annotated[tuple[Name, ...], MinLen(1), Words("one or more runs or adapters")]
    api_key_file: Name
    model: Name | None = None
    template: str = "auto"
    batch: PositiveInt = Limits.batch
    queue: PositiveInt = Limits.queue
    max_tokens: PositiveInt = Limits.new_tokens
    max_seconds: PositiveFloat = Limits.seconds


def app(args: dict[str, Any]) -> Any:
    """What ``import_path: zinit.serve.replicas:app`` makes: Ray Serve's application.

    Raises:
        ConfigError: if the arguments are wrong.
    """
    from ray import serve  # pyright: ignore[reportMissingImports]

    settings = Settings.from_dict(args)

    def server() -> FastAPI:
        return make_server(settings)  # on the replica

    room = settings.batch + settings.queue
    return serve.deployment(name="zinit", max_ongoing_requests=room)(serve.ingress(server)()).bind()


def make_server(settings: Settings) -> FastAPI:
    """The server of one replica, which runs.

    Raises:
        ZinitError: if something cannot be served.
    """
    from zinit.serve.engine import Engine
    from zinit.serve.served import Models

    keys = read_keys(settings.api_key_file)
    models = Models.of(name_sources(list(settings.sources)), model=settings.model, template=settings.template)
    limits = Limits(
        batch=settings.batch,
        queue=settings.queue,
        new_tokens=settings.max_tokens,
        seconds=settings.max_seconds,
    )
    engine = Engine(models, limits).start()
    return make_app(engine, keys=keys, on_stop=engine.stop, fixed=FIXED)
