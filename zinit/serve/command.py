"""The command ``zinit serve``: loads, listens, and goes down in order. Heavy modules are imported inside."""

from __future__ import annotations

import ipaddress
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from zinit.errors import ConfigError, install_extra, printable
from zinit.files import local_path

LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})
SHORTEST_KEY = 16
ADAPTED = "adapted"  # the run on the page of ``zinit chat --web``, beside "base"
GRACE = 10  # seconds


def serve(
    sources: Annotated[
        list[str], typer.Argument(metavar="RUN_OR_ADAPTER...", help="Folders or Hub ids, all of one base; NAME=FOLDER.")
    ],
    host: Annotated[str, typer.Option(help="Any but this machine's own needs --api-key-file.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    api_key_file: Annotated[str | None, typer.Option(help="A file with a key on each line.")] = None,
    model: Annotated[str | None, typer.Option(help="Where the base lies, if elsewhere now.")] = None,
    template: Annotated[str, typer.Option(help="For adapters without a run; see 'zinit ls templates'.")] = "auto",
    batch: Annotated[int, typer.Option(help="Answers that are generated at once.", min=1)] = 64,
    queue: Annotated[int, typer.Option(help="Answers that may wait.", min=1)] = 256,
    max_tokens: Annotated[int, typer.Option(help="Longest answer that may be asked for.", min=1)] = 4096,
    max_seconds: Annotated[float, typer.Option(help="Longest time of a request.", min=1)] = 600.0,
) -> None:
    """Serve adapters over OpenAI's API: one base in memory, many adapters in one batch.

    Every adapter is a model by the name of its folder; "base" is the model without one.

    Examples:
      zinit serve runs/my-run
      zinit serve chat=runs/a tone=runs/b --host 0.0.0.0 --api-key-file keys.txt
    """
    keys = read_keys(api_key_file)
    names = name_sources(sources)
    check_address(host, keys)
    check_packages("zinit serve")
    from zinit.serve.engine import Engine
    from zinit.serve.requests import Limits
    from zinit.serve.served import Models

    with bound(host, port) as listener:
        models = Models.of(names, model=model, template=template)
        limits = Limits(batch=batch, queue=queue, new_tokens=max_tokens, seconds=max_seconds)
        engine = Engine(models, limits).start()
        notes = [models.uses, *(f"{name}: {served.note}" for name, served in models.by_name.items() if served.note)]
        if models.device.type == "mps":
            notes.append("Apple's GPUs are not tested")
        for note in filter(None, notes):
            print(f"({printable(note)})", file=sys.stderr)
        print(f"serving {', '.join(models.by_name)} on {address(listener)}", file=sys.stderr)
        listen(engine, listener, keys=keys, hosts=own_names(listener) if is_loopback(host) else frozenset())


def serve_page(run_dir: str, **sampling: Any) -> None:
    """Serves the page of ``zinit chat --web`` for a run, to this machine alone, on a free port.

    Args:
        run_dir: of a finished run.
        sampling: what the page's settings show at first, see `zinit.serve.page.Page`.

    Raises:
        ZinitError: if the run cannot be served.
    """
    check_packages("zinit chat --web")
    from zinit.serve.engine import Engine
    from zinit.serve.page import Page
    from zinit.serve.requests import Limits
    from zinit.serve.served import Models
    from zinit.tasks.chat import check_system

    with bound("127.0.0.1", 0) as listener:
        models = Models(run_dir)
        models.add(ADAPTED, run_dir)
        served = models.get(ADAPTED)
        check_system(served.format, sampling.get("system", ""))
        engine = Engine(models, Limits(new_tokens=max(Limits.new_tokens, sampling["max_tokens"]))).start()
        page = Page(
            title=Path(run_dir).absolute().name,
            about=f"{type(models.base).__name__}, {len(served.gates())} sites with a prefix",
            sees=not served.blind,
            most=engine.limits.new_tokens,
            gates=served.gates,
            sampling=sampling,
        )
        print(f"open {address(listener)} in a browser; Ctrl-C ends", file=sys.stderr)
        listen(engine, listener, keys=frozenset(), hosts=LOOPBACK_NAMES, page=page)


def check_packages(command: str) -> None:
    """What a server needs is installed.

    Raises:
        ConfigError: if not.
    """
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if find_spec(package) is None:
            raise ConfigError(f"{command} needs {package}. {install_extra('serve')}")


def bound(host: str, port: int) -> socket.socket:
    """A socket that waits for connections.

    Raises:
        ConfigError: if the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}. Stop that, or take another "
            f"--port (0 is a free one)."
        ) from error


def address(listener: socket.socket) -> str:
    """Where a socket listens."""
    host, port, *_ = listener.getsockname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def own_names(listener: socket.socket) -> frozenset[str]:
    """The names of this machine that requests may be sent to: its usual ones, and what `address` says."""
    return LOOPBACK_NAMES | {address(listener).removeprefix("http://").rpartition(":")[0]}


def listen(
    engine: Any, listener: socket.socket, *, keys: frozenset[str], hosts: frozenset[str], page: Any = None
) -> None:
    """Answers requests until it is told to stop; what is being answered then has some seconds to end."""
    import uvicorn

    from zinit.serve.http import make_app
    from zinit.serve.page import add_page

    app = make_app(engine, keys=keys, hosts=hosts, on_stop=engine.stop)
    if page is not None:
        add_page(app, page)
    settings = uvicorn.Config(
        app,
        access_log=False,
        log_level="warning",
        log_config=None,  # uvicorn's own would close the handlers of everybody else
        timeout_graceful_shutdown=GRACE,
        server_header=False,
    )
    uvicorn.Server(settings).run(sockets=[listener])


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_address(host: str, keys: frozenset[str]) -> None:
    """Others may reach the server with a key only.

    Raises:
        ConfigError: if there is none.
    """
    if not is_loopback(host) and not keys:
        raise ConfigError(
            f"--host {host} lets others reach the server: give them keys, with --api-key-file FILE (one on each line), "
            f"or listen on 127.0.0.1."
        )


def read_keys(file: str | None) -> frozenset[str]:
    """The keys of a file, one on each line.

    Raises:
        ConfigError: if it cannot be read, holds none, or one that is easily guessed.
    """
    if file is None:
        return frozenset()
    try:
        lines = local_path(file).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {file} cannot be read: {error}.") from error
    if not lines or min(map(len, lines)) < SHORTEST_KEY or not all(line.isascii() for line in lines):
        raise ConfigError(
            f"--api-key-file {file}: expected a key of {SHORTEST_KEY} or more ASCII characters on each line. Make one: "
            f"python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    return frozenset(lines)


def name_sources(sources: list[str]) -> dict[str, str]:
    """The name of each source in requests: what stands before "=", or the last part of its path.

    Raises:
        ConfigError: if two have the same.
    """
    found: dict[str, str] = {}
    for source in sources:
        name, equals, where = source.partition("=")
        if not equals or "/" in name:
            where = source
            name = Path(source).name or Path(source).absolute().name
        if name in found:
            raise ConfigError(f"{found[name]} and {where} are both named {name!r}. Name them: NAME=FOLDER.")
        found[name] = where
    return found
