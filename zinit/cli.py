"""The command line: parses, calls, prints. Heavy modules are imported inside the commands."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

import zinit
from zinit.errors import ConfigError, ZinitError, is_by_settings, printable
from zinit.serve.command import serve, serve_page
from zinit.ui import index, tools
from zinit.ui.options import (
    Experts,
    Frozen,
    Images,
    Index,
    Json,
    MaxNewTokens,
    Options,
    RetrievalOptions,
    RunDirectory,
    SamplingSeed,
    System,
    Temperature,
    TopP,
    check_page_sampling,
    check_retrieval,
)
from zinit.ui.tune import tune


class OnceEach(TyperCommand):
    """A command that refuses an option given twice, unless it takes several values: the first would be lost."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for option in order:
            is_single = not getattr(option, "multiple", True) and not getattr(option, "is_flag", False)
            if is_single and order.count(option) > 1:
                ctx.fail(f"{option.opts[-1]} was given {order.count(option)} times, but takes one value.")
        return super().parse_args(ctx, args)


class App(typer.Typer):
    """A Typer whose commands are `OnceEach`."""

    def command(self, *arguments: Any, **settings: Any) -> Any:
        return super().command(*arguments, **{"cls": OnceEach, **settings})


app = App(
    name="zinit",
    help="Zero-init attention for any pretrained Transformer: train, evaluate, talk to it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"zinit {zinit.__version__}")
        raise typer.Exit


@app.callback()
def options_of_all(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Which zinit this is.")
    ] = False,
) -> None:
    """Zero-init attention for any pretrained Transformer: train, evaluate, talk to it."""


@app.command()
def train(
    backbone: Annotated[str | None, typer.Option(help="llama, ... ; see 'zinit ls backbones'.")] = None,
    task: Annotated[str | None, typer.Option(help="Default: the backbone's own.")] = None,
    method: Annotated[str | None, typer.Option(help="How the model is adapted; see 'zinit ls methods'.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or Hub id. Default: the embedded demo.")] = None,
    encoder: Annotated[
        str | None, typer.Option(help="Image model for methods with images: folder, name or Hub id.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="File, folder or Hub id; texts may come from several. Default: the demo's.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Published or demo settings; see 'zinit ls presets'.")] = None,
    config: Annotated[str | None, typer.Option(help="A TOML file of settings.")] = None,
    option: Options = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    output: Annotated[str | None, typer.Option(help="A new folder. Default: runs/<backbone>-<task>-<time>.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output.")] = False,
    start: Annotated[
        str | None, typer.Option("--from", help="Start from the weights of this run or adapter: folder or Hub id.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Adapt a model and evaluate it, frozen and adapted.

    With nothing but --backbone the embedded demo is trained, offline.

    Examples:
      zinit train --backbone llama
      zinit train --backbone llama --method v1-multimodal
      zinit train --backbone llama --model DIR_OR_ID --data alpaca.json --preset alpaca/llama-7b
      zinit train --backbone llama --from runs/my-run -o train.epochs=1
      zinit train --resume --output runs/my-run
    """
    from zinit.runs.settings import override, resolve

    if resume:
        if output is None:
            raise ConfigError("say which run to go on with: --resume --output RUN_DIR.")
        from zinit.runs.record import check_run

        check_run(output)
        from zinit.runs.directory import read_run

        given = {"--backbone": backbone, "--task": task, "--method": method, "--preset": preset, "--config": config}
        given |= {"--from": start}
        if extra := [flag for flag, value in given.items() if value is not None]:
            raise ConfigError(f"a resumed run keeps its settings: leave out {', '.join(extra)}.")
        saved, record = read_run(output)
        preset_name: str | None = record.preset
        settings = override(saved, model=model, encoder=encoder, data=data or None, seed=seed, options=option or ())
    else:
        settings, preset_name = resolve(
            backbone=backbone,
            task=task,
            method=method,
            model=model,
            encoder=encoder,
            data=data,
            preset=preset,
            config_file=config,
            seed=seed,
            warm_start=start,
            options=option or (),
        )
        if output is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("say where the run goes, so that all processes agree on it: --output DIR.")
    from zinit.runs.directory import new_folder  # torch: after what can be said without it
    from zinit.runs.train import train_run
    from zinit.tasks import TASKS
    from zinit.train.checkpoint import resume_command
    from zinit.train.loop import Interrupted
    from zinit.ui.console import RunView, is_main_process, print_json, print_metrics, say

    view = RunView(quiet=as_json)
    named = f"runs/{settings.backbone}-{settings.task}-{time.strftime('%Y%m%d-%H%M%S')}"
    with nullcontext(Path(output)) if output else new_folder(Path(named)) as folder:
        try:
            results = train_run(settings, folder, preset=preset_name, resume=resume, on_event=view)
        except (Interrupted, KeyboardInterrupt) as interruption:
            view.close()
            if is_main_process():
                if isinstance(interruption, Interrupted):
                    say(f"stopped after step {interruption.step}; everything is saved.", error=True)
                if (folder / "run.json").exists():
                    say(f"Go on with: {resume_command(folder)}", error=True)
                else:
                    say("stopped before training began; nothing was written.", error=True)
            raise typer.Exit(130) from None
        finally:
            view.close()
    if as_json:
        print_json({"output": str(folder), **results})
        return
    print_metrics(results, title=f"{settings.backbone} / {settings.task}")
    view.console.print(f"\nEverything is in {folder}; look at {folder}/report.html", soft_wrap=True)
    if TASKS.get(settings.task).generates and (folder / "adapter.json").exists():
        view.console.print(f"Talk to it: zinit chat {shlex.quote(str(folder))}", soft_wrap=True)


@app.command()
def eval(
    run_dir: RunDirectory,
    data: Annotated[str | None, typer.Option(help="Evaluate on all of this instead of the held-out part.")] = None,
    limit: Annotated[int | None, typer.Option(help="Examples to generate an answer for.", min=0)] = None,
    output: Annotated[str | None, typer.Option(help="A folder for the answers, as predictions.json.")] = None,
    experts: Experts = None,
    suite: Annotated[
        str | None, typer.Option(help="mme, mmbench, pope, vqa (with --data), or lm-eval:TASK,... ; 'zinit ls suites'.")
    ] = None,
    fewshot: Annotated[int | None, typer.Option(help="Examples before each question, for lm-eval.", min=0)] = None,
    index: Index = None,
    option: RetrievalOptions = None,
    as_json: Json = False,
) -> None:
    """Evaluate a run or a checkpoint, frozen and adapted. Questions without answers (a blind set) are answered only."""
    from zinit.runs.record import check_run

    check_run(run_dir)  # what is wrong with a path is said before torch is imported
    from zinit.ui.console import print_json, print_metrics

    if suite is None:
        from zinit.runs.evaluate import evaluate_run

        if fewshot is not None:
            raise ConfigError("--fewshot is for suites of lm-eval: --suite lm-eval:TASK,...")
        mixed = check_retrieval(index, option)
        results = evaluate_run(run_dir, data=data, limit=limit, output=output, experts=experts, **mixed)
    else:
        from zinit.runs.suites import evaluate_suite

        if experts is not None or index is not None or option:
            raise ConfigError("suites are asked without experts and index. Leave --experts, --index and -o out.")
        results = evaluate_suite(run_dir, suite, data=data, limit=limit, fewshot=fewshot, output=output)
    if as_json:
        print_json(results)
    else:
        print_metrics(results, title=run_dir)


@app.command()
def generate(
    run_dir: RunDirectory,
    prompt: Annotated[str | None, typer.Option(help="The instruction.")] = None,
    input: Annotated[str, typer.Option(help="Further context for the instruction.")] = "",
    data: Annotated[str | None, typer.Option(help="A file of records instead; the answers go to --output.")] = None,
    output: Annotated[str | None, typer.Option(help="A new file, a JSON object on each line.")] = None,
    batch: Annotated[int, typer.Option(help="Answers that are generated at once, with --data.", min=1)] = 32,
    system: System = "",
    image: Images = None,
    experts: Experts = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it stands, without the template.")] = False,
    temperature: Temperature = 0.1,
    top_p: TopP = 0.75,
    max_new_tokens: MaxNewTokens = 256,
    seed: SamplingSeed = 0,
    frozen: Frozen = False,
    index: Index = None,
    option: RetrievalOptions = None,
    as_json: Json = False,
) -> None:
    """Answer one instruction, which streams to the standard output, or a file of them.

    Examples:
      zinit generate runs/my-run --prompt "Name three colours."
      zinit generate runs/my-run --data questions.jsonl --output answers.jsonl
    """
    from zinit.runs.record import check_run

    check_run(run_dir)  # what is wrong with a path is said before torch is imported
    from zinit.ui.console import print_json

    how: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens, "seed": seed}
    how |= {"base": frozen, "system": system, **check_retrieval(index, option)}
    if data is not None:
        alone = {"--prompt": prompt, "--input": input, "--image": image, "--experts": experts, "--raw": raw}
        if given := [flag for flag, value in alone.items() if value]:
            raise ConfigError(f"{', '.join(given)} is for one instruction: leave it out, or --data.")
        if output is None:
            raise ConfigError("say where the answers go: --output FILE.jsonl.")
        from zinit.ui.answers import run_file

        run_file(run_dir, data, output, batch=batch, quiet=as_json, **how)
        return
    if prompt is None or output is not None:
        raise ConfigError("give either --prompt TEXT, or --data FILE --output FILE.jsonl.")
    from zinit.ui.chat import ChatSession

    session = ChatSession(run_dir, experts=experts, **how)
    answer = session.answer(prompt, input=input, images=image or (), raw=raw, stream=not as_json)
    if as_json:
        shown = {"system": system, "images": image or []}
        print_json({"prompt": prompt, "input": input, **shown, "answer": answer, "frozen": frozen, "seed": seed})


@app.command()
def chat(
    run_dir: RunDirectory,
    system: System = "",
    image: Images = None,
    experts: Experts = None,
    temperature: Temperature = 0.1,
    top_p: TopP = 0.75,
    max_new_tokens: MaxNewTokens = 256,
    seed: SamplingSeed = 0,
    frozen: Frozen = False,
    index: Index = None,
    option: RetrievalOptions = None,
    web: Annotated[bool, typer.Option("--web", help="On a page in the browser, beside the base.")] = False,
) -> None:
    """Talk to a tuned model over several turns. /new starts over, /image FILE shows one, /quit (or Ctrl-D) ends."""
    from zinit.runs.record import check_run

    check_run(run_dir)  # what is wrong with a path is said before torch is imported
    if web:
        of_the_terminal = {"--image": image, "--experts": experts, "--frozen": frozen, "--index": index, "-o": option}
        if given := [flag for flag, value in of_the_terminal.items() if value]:
            raise ConfigError(f"{', '.join(given)} is for the terminal: the page of --web has its own. Leave it out.")
        how = {"temperature": temperature, "top_p": top_p, "max_tokens": max_new_tokens, "seed": seed}
        check_page_sampling(how)
        serve_page(run_dir, system=system, **how)
        return
    from zinit.ui.chat import ChatSession

    session = ChatSession(
        run_dir,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        seed=seed,
        base=frozen,
        system=system,
        experts=experts,
        **check_retrieval(index, option),
    )
    session.converse(image or ())


app.command()(serve)


@app.command()
def bench(
    preset: Annotated[str | None, typer.Option(help="A ready benchmark; see 'zinit ls benchmarks'.")] = None,
    config: Annotated[str | None, typer.Option(help="A TOML file of experiments.")] = None,
    backbone: Annotated[list[str] | None, typer.Option(help="Only this one; repeatable.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Only this one; repeatable.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Repeatable; see 'zinit ls methods'.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Repeatable.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or Hub id, for all experiments.")] = None,
    data: Annotated[str | None, typer.Option(help="File, folder or Hub id, for all experiments.")] = None,
    option: Options = None,
    output: Annotated[str, typer.Option(help="A new folder, or one of this benchmark, to go on.")] = "runs/bench",
    on: Annotated[str, typer.Option(help="local, or ray: the machines of a Ray cluster.")] = "local",
    jobs: Annotated[
        int | None, typer.Option(help="Runs side by side. Default: one per GPU, or per core (at most 8).", min=1)
    ] = None,
    budget: Annotated[float | None, typer.Option(help="Minutes after which no further run starts.", min=0)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands of the runs and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Compare methods: backbones x tasks x methods x seeds, one run each, with tables and plots.

    The same command goes on where it was stopped or killed; a finished run is never repeated.

    Examples:
      zinit bench --preset demo
      zinit bench --backbone llama --method zero-init --method lora --seed 0 --seed 1 --model DIR --data alpaca.json
    """
    from zinit.bench.plan import make_benchmark
    from zinit.ui.benchmark import run_benchmark
    from zinit.ui.console import print_json, say

    benchmark = make_benchmark(
        preset=preset,
        config_file=config,
        backbones=backbone or (),
        tasks=task or (),
        methods=method or (),
        seeds=seed or (),
        model=model,
        data=data,
        options=option or (),
    )
    benchmark.check()
    if dry_run:
        cells = [cell for experiment in benchmark.experiments for cell in experiment.selection_cells()]
        cells += [cell for _, cell in benchmark.cells()]
        if as_json:
            print_json({"cells": [{"id": cell.id, "command": cell.command()} for cell in cells]})
        else:
            say("\n".join(cell.command() for cell in cells))
        return
    finished = run_benchmark(
        benchmark,
        Path(output),
        on=on,
        jobs=jobs,
        budget=None if budget is None else 60 * budget,
        quiet=as_json,
    )
    if as_json:
        print_json({"output": output, "finished": finished.complete, "rows": [row.to_dict() for row in finished.rows]})
    if finished.status:
        raise typer.Exit(finished.status)


app.command()(tune)
app.command()(tools.inspect)
app.command(name="ls")(tools.list_entries)
app.command()(tools.convert)

indices = App(name="index", help="Features for cache retrieval.", no_args_is_help=True, rich_markup_mode=None)
indices.command()(index.build)
indices.command()(index.info)
app.add_typer(indices)

app.command()(tools.push)
app.command()(tools.doctor)


def _clean(format_warning: Any) -> Any:
    """Warnings quote files and names: no control character of theirs reaches the terminal."""
    return lambda *arguments, **options: printable(format_warning(*arguments, **options))


def main() -> None:
    """Entry point: the user's errors are one message and status 2; a fault of zinit's shows its traceback, status 1."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.formatwarning = _clean(warnings.formatwarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore", FutureWarning)  # of libraries, for who writes code against them
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao, which transformers loads, sets it off
    if not sys.stderr.isatty():  # bars of downloads are for people
        for library in ("HF_HUB", "HF_DATASETS"):
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except ZinitError as error:
        from zinit.ui.console import print_error, print_json

        print_error(error)
        if "--json" in sys.argv:  # scripts ask whether the same command may go better another time
            print_json({"error": str(error), "by_settings": is_by_settings(error)})
        sys.exit(2)
