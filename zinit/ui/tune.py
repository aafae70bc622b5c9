"""The command ``zinit tune``. Heavy modules are imported inside."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from zinit.errors import ConfigError, install_extra
from zinit.ui.options import Json

SHOWN = 10  # trials on the terminal


def tune(
    backbone: Annotated[str, typer.Option(help="llama, ... ; see 'zinit ls backbones'.")],
    task: Annotated[str | None, typer.Option(help="Default: the preset's, or the backbone's own.")] = None,
    method: Annotated[str | None, typer.Option(help="Default: the preset's, or zero-init.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or Hub id. Default: the embedded demo.")] = None,
    data: Annotated[str | None, typer.Option(help="File, folder or Hub id. Default: the demo's.")] = None,
    preset: Annotated[str | None, typer.Option(help="Settings of the runs; see 'zinit ls presets'.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("-o", "--option", metavar="KEY=VALUE", help="Any setting, of all runs.")
    ] = None,
    validation: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="What holds a part out for the trials: task.held_out_data=FILE."),
    ] = None,
    range: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=LOW:HIGH", help="Also search this: a setting, or a factor on a role's rate."),
    ] = None,
    metric: Annotated[str, typer.Option(help="What is compared, as metrics.json names it.")] = "loss",
    trials: Annotated[int, typer.Option(help="How many in all, those of before included.", min=1)] = 20,
    seed: Annotated[int, typer.Option(help="Of the trials and of the search.")] = 0,
    output: Annotated[str, typer.Option(help="A new folder, or one of this search, to go on.")] = "runs/tune",
    jobs: Annotated[
        int | None, typer.Option(help="Runs side by side. Default: one per GPU, or per core (at most 8).", min=1)
    ] = None,
    as_json: Json = False,
) -> None:
    """Search rates, K (prefix.length) and L (prefix.layers) on a validation part, by Optuna; a run per trial.

    The same command goes on where it was stopped or killed; a finished trial is never repeated.

    Examples:
      zinit tune --backbone llama --task conversation
      zinit tune --backbone llama --model DIR --data train.json --validation task.held_out_data=validation.json
    """
    if find_spec("optuna") is None:
        raise ConfigError(f"zinit tune needs optuna. {install_extra('tune')}")
    from zinit.bench.tune import make_plan

    what = {"backbone": backbone, "task": task, "method": method, "preset": preset, "model": model, "data": data}
    how = {"options": option or (), "validation": validation or (), "ranges": range or ()}
    plan = make_plan(**what, **how, seed=seed, metric=metric)  # pyright: ignore[reportArgumentType]
    plan.check()
    if status := _run(plan, Path(output), trials=trials, jobs=jobs, as_json=as_json):
        raise typer.Exit(status)


def _run(plan: Any, output: Path, *, trials: int, jobs: int | None, as_json: bool) -> int:
    """Runs a search with progress on the terminal, and prints what it found; the exit status."""
    from rich.progress import Progress

    from zinit.bench.tune import Search
    from zinit.bench.tune_page import table
    from zinit.ui.benchmark import COLUMNS, Finished, View, stopping_on_signals
    from zinit.ui.console import SafeConsole, print_json, print_table, say

    console, ended = SafeConsole(stderr=True), Finished()
    with Progress(*COLUMNS, console=console, disable=as_json) as progress:
        search = Search(plan, output, trials=trials, jobs=jobs, on_event=View(progress, ended))
        with stopping_on_signals(search.runner, ended):
            document = search.run()
    best = document["best"]
    if as_json:
        print_json({"output": str(output), **document})
    else:
        header, lines = table(document)
        print_table(f"{plan.experiment.name}: the best of {len(lines)} trials", header, lines[:SHOWN])
        if best:
            say(f"The best settings, trial {best['number']}:\n{best['command']}")
    console.print(f"All trials: {output}/report.html, {output}/tune.json", soft_wrap=True)
    for cell in ended.failed:
        console.print(f"failed: {cell}; the same command tries it again")
    if ended.interrupted:
        console.print("stopped; everything is saved. The same command goes on.")
        return 130
    return 1 if ended.failed else 0 if best else 2
