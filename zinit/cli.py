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
from zinit.ui import index
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

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
RunDirectory = Annotated[str, typer.Argument(help="The folder of a run, or of a checkpoint in it.", metavar="RUN_DIR")]
Options = Annotated[
    list[str] | None,
    typer.Option("-o", "--option", metavar="KEY=VALUE", help="Any setting: -o prefix.length=20 -o train.epochs=3."),
]
Temperature = Annotated[float, typer.Option(help="0 is greedy. The paper's: 0.1.", min=0.0)]
TopP = Annotated[float, typer.Option(help="Nucleus sampling. The paper's: 0.75.", min=0.0, max=1.0)]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)]
Frozen = Annotated[bool, typer.Option("--frozen", help="Without the adapter, for comparison.")]
System = Annotated[str, typer.Option(help="What the assistant is told before all else.")]
Experts = Annotated[str | None, typer.Option(help="What writes about images: ocr,caption:RUN; see 'zinit ls experts'.")]
Images = Annotated[
    list[str] | None,
    typer.Option("--image", "--audio", "--video", help="A file for the run's encoder; repeatable."),
]


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
        results = evaluate_run(run_dir, data=data, limit=limit, output=output, experts=experts)
    else:
        from zinit.runs.suites import evaluate_suite

        if experts is not None:
            raise ConfigError("suites are asked without experts. Leave --experts out.")
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
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    frozen: Frozen = False,
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
    how |= {"base": frozen, "system": system}
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
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    frozen: Frozen = False,
    web: Annotated[bool, typer.Option("--web", help="On a page in the browser, beside the base.")] = False,
) -> None:
    """Talk to a tuned model over several turns. /new starts over, /image FILE shows one, /quit (or Ctrl-D) ends."""
    from zinit.runs.record import check_run

    check_run(run_dir)  # what is wrong with a path is said before torch is imported
    if web:
        of_the_terminal = {"--image": image, "--experts": experts, "--frozen": frozen}
        if given := [flag for flag, value in of_the_terminal.items() if value]:
            raise ConfigError(f"{', '.join(given)} is for the terminal: the page of --web has its own. Leave it out.")
        serve_page(run_dir, system=system, temperature=temperature, top_p=top_p, max_tokens=max_new_tokens, seed=seed)
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
    seed: Annotated[list[int] | None, typer.Option(help="Repeatable.", min=0)] = None,
    model: Annotated[str | None, typer.Option(help="Folder or Hub id, for all experiments.")] = None,
    data: Annotated[str | None, typer.Option(help="File, folder or Hub id, for all experiments.")] = None,
    option: Options = None,
    output: Annotated[str, typer.Option(help="A new folder, or one of this benchmark, to go on.")] = "runs/bench",
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
        jobs=jobs,
        budget=None if budget is None else 60 * budget,
        quiet=as_json,
    )
    if as_json:
        print_json({"output": output, "finished": finished.complete, "rows": [row.to_dict() for row in finished.rows]})
    if finished.status:
        raise typer.Exit(finished.status)


app.command()(tune)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Folder, Hub id, or a backbone's name for its embedded demo.")],
    backbone: Annotated[str | None, typer.Option(help="Default: the one that knows the model.")] = None,
    option: Options = None,
    train: Annotated[bool, typer.Option("--train", help="Also estimate memory and time of a training step.")] = False,
    batch: Annotated[int, typer.Option(help="Examples of a forward pass, for --train.", min=1)] = 8,
    length: Annotated[int, typer.Option(help="Tokens of each, for --train.", min=1)] = 256,
    as_json: Json = False,
) -> None:
    """Where a prefix would go in a model, of which shapes, and how much it would train. Downloads no weights."""
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
        f"trainable {found['num_trainable']:,} of {found['num_parameters']:,} parameters "
        f"({100 * found['num_trainable'] / found['num_parameters']:.3f} %), {found['file_bytes'] / 1e6:.2f} MB saved"
    )
    if train:
        say(describe_training(found["training"]))


@app.command(name="ls")
def list_entries(
    what: Annotated[str, typer.Argument(help="backbones, tasks, methods, templates, presets, ...")],
    as_json: Json = False,
) -> None:
    """List what there is to choose from."""
    from zinit.ui.console import print_json, print_table
    from zinit.ui.listing import list_kind

    entries = list_kind(what)
    if as_json:
        print_json(entries)
    else:
        print_table(what, ["name", "what it is"], [[name, text] for name, text in entries.items()])


@app.command()
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


indices = App(name="index", help="Features for cache retrieval.", no_args_is_help=True, rich_markup_mode=None)
indices.command()(index.build)
indices.command()(index.info)
app.add_typer(indices)


@app.command()
def push(
    run_dir: RunDirectory,
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


@app.command()
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
