"""The commands about models, adapters and this machine: inspect, ls, convert, push, doctor.

Heavy modules are imported inside the commands.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from zinit.errors import ConfigError
from zinit.ui.options import Json, Options


def inspect(
    model: Annotated[str, typer.Argument(help="Folder, Hub id, or a backbone's name for its embedded demo.")],
    backbone: Annotated[str | None, typer.Option(help="Default: the one that knows the model.")] = None,
    option: Options = None,
    train: Annotated[bool, typer.Option("--train", help="Also estimate memory and time of a training step.")] = False,
    batch: Annotated[int, typer.Option(help="Examples of a forward pass, for --train.", min=1)] = 8,
    length: Annotated[int, typer.Option(help="Tokens of each, for --train.", min=1)] = 256,
    as_json: Json = False,
) -> None:
    """Where a prefix would go in a model, of which shapes, and how much it would train. Downloads no weights.

    Of another method with -o method=NAME.
    """
    from zinit.backbones import BACKBONES
    from zinit.files import model_source

    if model not in BACKBONES:
        model_source(model)
    from zinit.ui.console import print_json, print_table, say
    from zinit.ui.inspection import describe_training, estimate_training, inspect_model

    how: dict[str, Any] = {"backbone": backbone, "options": option or ()}
    found = inspect_model(model, **how)
    if train:
        found["training"] = estimate_training(model, batch=batch, length=length, **how)
    if as_json:
        print_json(found)
        return
    shape = ("width", "num_heads", "num_kv_heads", "head_dim")
    rows = [
        [site["name"], *(str(site[key]) for key in shape), "yes" if site["adapted"] else ""] for site in found["sites"]
    ]
    print_table(
        f"{found['class']} (backbone {found['backbone']})",
        ["attention", "width C", "heads H", "kv heads G", "head dim D", "prefix"],
        rows,
    )
    say(
        f"{found['method']}: trainable {found['num_trainable']:,} of {found['num_parameters']:,} parameters "
        f"({100 * found['num_trainable'] / found['num_parameters']:.3f} %), {found['file_bytes'] / 1e6:.2f} MB saved"
    )
    if train:
        say(describe_training(found["training"]))


def list_entries(
    what: Annotated[str, typer.Argument(help="backbones, tasks, methods, settings, presets, ...")],
    as_json: Json = False,
) -> None:
    """List what there is to choose from; 'zinit ls settings' all settings, with type, default and limits."""
    if what == "settings":
        _list_settings(as_json=as_json)
        return
    from zinit.ui.console import print_json, print_table
    from zinit.ui.listing import list_kind

    entries = list_kind(what)
    if as_json:
        print_json(entries)
    else:
        print_table(what, ["name", "what it is"], [[name, text] for name, text in entries.items()])


def _list_settings(*, as_json: bool) -> None:
    from zinit.ui.console import print_json, print_table
    from zinit.ui.settings import HEADER, settings_tables

    tables = settings_tables()
    if as_json:
        print_json([table.to_dict() for table in tables])
        return
    for table in tables:
        print_table(f"\n{table.title}: {table.about}", HEADER, table.rows())


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="An adapter: a file or a folder.")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="Where the converted one goes; must not exist.")],
    source_format: Annotated[str, typer.Option("--from", help="zinit, or a name of 'zinit ls formats'.")],
    target_format: Annotated[str, typer.Option("--to", help="zinit, official-v1, peft, imagebind-llm.")],
    model: Annotated[
        str | None, typer.Option(help="The model it belongs to: folder or Hub id. zinit's own adapters name it.")
    ] = None,
    length: Annotated[int, typer.Option(help="K; official files do not say it.", min=1)] = 10,
    gate: Annotated[str, typer.Option(help="tanh or identity; official files do not say it.")] = "tanh",
    reader: Annotated[
        str, typer.Option(help="Whose gates an official file holds: the training or the inference code's.")
    ] = "training",
    tables: Annotated[bool, typer.Option("--tables", help="To zinit: tables instead of networks of prompts.")] = False,
    as_json: Json = False,
) -> None:
    """Convert an adapter between zinit's, the reference's, PEFT's and LitGPT's formats."""
    from zinit.interop.convert import convert
    from zinit.ui.console import print_json, say

    if gate not in ("tanh", "identity"):
        raise ConfigError(f"--gate must be tanh or identity; got {gate!r}.")
    options: dict[str, Any] = {"reader": reader} if target_format == "official-v1" else {}
    options |= {"tables": True} if tables and target_format == "zinit" else {}  # the others hold tables anyway
    handle = convert(
        source,
        destination,
        source_format=source_format,
        target_format=target_format,
        model=model,
        length=length,
        gate=gate,
        **options,
    )
    if as_json:
        print_json({"destination": destination, "layers": len(handle.prefixes), "num_trainable": handle.num_trainable})
    else:
        say(f"wrote {destination}: {len(handle.prefixes)} layers, {handle.num_trainable:,} parameters")


def push(
    run_dir: Annotated[str, typer.Argument(help="The folder of a finished run.", metavar="RUN_DIR")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="USER/NAME on the Hub; it is made if need be.")],
    private: Annotated[bool | None, typer.Option("--private/--public", help="Of a new repository.")] = None,
    as_json: Json = False,
) -> None:
    """Upload a finished run's adapter to the Hub, with a model card; zinit.from_pretrained loads it."""
    from zinit.runs.card import push as upload
    from zinit.ui.console import print_json, say

    where = upload(run_dir, repository, private=private)
    if as_json:
        print_json({"repository": repository, "commit": where})
    else:
        say(f"pushed to {where}; name its licence in the card (README.md) there")


def doctor(as_json: Json = False) -> None:
    """Check this machine: versions, extras, devices, what they compute, a training step, the embedded demos."""
    from zinit.ui.console import print_json, print_table, say
    from zinit.ui.doctor import examine

    report = examine()
    if as_json:
        print_json(report)
    else:
        print_table("zinit doctor", ["check", "found"], [[k, str(v)] for k, v in report["found"].items()])
        for problem in report["problems"]:
            say(f"problem: {problem}")
        say("all well" if not report["problems"] else f"{len(report['problems'])} problems")
    if report["problems"]:
        raise typer.Exit(1)
