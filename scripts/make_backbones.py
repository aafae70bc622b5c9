"""Writes docs/backbones.md: which families of the installed transformers and timm take a prefix, found by trying each.

    python -m scripts.make_backbones [--jobs 2] [--log FILE] [--only NAME ...] [--output docs/backbones.md]

For every family a tiny random model is built and run, and a prefix attached to all its sites. Then a closed gate
must change no bit, an open one must change the output, gradients must reach the gates (and the prompts once the gates
are open), and detaching must restore the output and the names of the state. Each family runs in a process of its own.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import inspect
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from torch import Tensor, nn

import zinit
from scripts.tiny_models import floats, randomized, tiny_transformer, variants_of
from zinit.adapter.attach import get_handle
from zinit.backbones._discover import FOREIGN
from zinit.backbones._replay import Replay, states_of
from zinit.errors import BackboneError

TIMEOUT = 180  # seconds of a processor, whatever else the machine does
HANGS = 20 * TIMEOUT  # seconds on the clock
UNSEEN = ("no gate gets a gradient", "an open gate changes nothing")
Result = dict[str, Any]


def check(model: nn.Module, call: Any) -> Result:
    """Attaches to every site and checks the contract. ``call()`` returns the floating tensors of the output.

    Raises:
        AssertionError: naming what does not hold.
        BackboneError: if the model is refused.
    """
    model.requires_grad_(False)  # torch's own modules choose other kernels for frozen weights
    base, names = call(), list(model.state_dict())
    handle = zinit.attach(model, zinit.PrefixConfig(length=3), seed=0)
    elsewhere: list[str] = []

    def watch(name: str) -> Any:
        def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            elsewhere.extend(f"{name} got {k}" for k, v in kwargs.items() if v is not None and FOREIGN.search(k))

        return look

    hooks = [s.module.register_forward_pre_hook(watch(s.name), with_kwargs=True) for s in handle.sites]
    same(call(), base, "a closed gate changes the output")
    for hook in hooks:
        hook.remove()
    assert not elsewhere, f"an adapted module attends elsewhere: {elsewhere[0]}"
    backward(call)
    reached = [name for name, p in handle.prefixes.items() if p.gate.grad is not None and p.gate.grad.abs().max() > 0]
    assert reached, "no gate gets a gradient"
    for name in reached:
        prompt = handle.prefixes[name].get_parameter("prompt.weight").grad
        assert prompt is None or not prompt.any(), "a prompt gets a gradient while its gate is closed"
    with torch.no_grad():
        for prefix in handle.prefixes.values():
            prefix.gate.fill_(0.5)
    opened = call()
    assert any(not torch.equal(a, b) for a, b in zip(opened, base, strict=True)), "an open gate changes nothing"
    backward(call)
    grads = {name: handle.prefixes[name].get_parameter("prompt.weight").grad for name in reached}
    flows = [name for name, grad in grads.items() if grad is not None and grad.abs().max() > 0]
    assert flows == reached, f"{len(reached) - len(flows)} prompts get no gradient"
    sites = [{"class": type(site.module).__name__, "tower": site.tower, **site.shape()} for site in handle.sites]
    backbone = handle.backbone
    get_handle(model).detach()
    same(call(), base, "detaching does not restore the output")
    assert list(model.state_dict()) == names, "detaching does not restore the state"
    return {"backbone": backbone, "sites": sites, "reached": len(reached)}


def same(now: list[Tensor], before: list[Tensor], complaint: str) -> None:
    """The outputs agree bit for bit."""
    for a, b in zip(now, before, strict=True):
        assert torch.equal(a, b) or torch.equal(a.nan_to_num(), b.nan_to_num()), complaint


def backward(call: Any) -> None:
    """Gradients of one number computed from the whole output."""
    with torch.enable_grad():
        total = sum(
            (tensor * torch.linspace(-1, 1, tensor.numel()).view_as(tensor)).sum()
            for tensor in call(grad=True)
            if tensor.requires_grad
        )
        if isinstance(total, Tensor):
            total.nan_to_num().backward()


def caller(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    """A function that runs the model on the same inputs and random numbers."""

    def call(grad: bool = False) -> list[Tensor]:
        torch.manual_seed(0)
        with torch.set_grad_enabled(grad):
            return [tensor.float() for tensor in floats(model(**inputs))]

    return call


class Alone(nn.Module):
    """Runs the attention modules one by one on random hidden states: for models whose inputs are unknown."""

    def __init__(self, model: nn.Module, sites: list[Any]) -> None:
        super().__init__()
        self.inner, self.replayed = model, [(site.module, site.project_kv) for site in sites]

    def forward(self) -> list[Tensor]:
        out: list[Tensor] = []
        for module, replay in self.replayed:
            assert isinstance(replay, Replay)
            states = states_of(module, replay)
            out += floats(module(states, **replay.arguments(module, states)))
        return out


def try_transformers(model_type: str) -> Result:
    """Everything about one family of transformers."""
    from zinit.backbones import find_backbone

    model, inputs = tiny_transformer(model_type)
    found: Result = {"class": type(model).__name__, "run": inputs is not None}
    sites = find_backbone(model).sites(model)
    found |= trial(model, inputs, sites)
    found["variants"] = {what: try_variant(config, inputs) for what, config in variants_of(model.config)}
    return found


def trial(model: Any, inputs: dict[str, Tensor] | None, sites: list[Any]) -> Result:
    """The contract for one model, with its default attention and with eager attention."""
    if inputs is None:
        return check_alone(Alone(model, sites), model)
    found = check(model, caller(model, inputs))
    try:
        model.set_attn_implementation("eager")
        caller(model, inputs)()
    except Exception:  # this family has no such implementation
        return found
    check(model, caller(model, inputs))
    return found


def try_variant(config: Any, inputs: dict[str, Tensor] | None) -> str:
    """What comes of a variant that a config offers: "supported", "not built", or why not."""
    import transformers

    from zinit.backbones import find_backbone

    torch.manual_seed(0)
    try:
        model = randomized(transformers.AutoModel.from_config(config))
        if inputs is not None:
            caller(model, inputs)()
    except Exception:  # this combination is not allowed
        return "not built"
    try:
        trial(model, inputs, find_backbone(model).sites(model))
    except BackboneError as error:
        return f"refused: {error}"
    except AssertionError as error:
        return "not reached" if str(error) in UNSEEN else f"broken: {error}"
    except Exception as error:
        return f"broken: {type(error).__name__}: {error}"
    return "supported"


def check_alone(alone: Alone, model: nn.Module) -> Result:
    """The contract for a model whose modules are run one by one."""
    return check(model, caller(alone, {}))


def try_timm(name: str) -> Result:
    """Everything about one variant of timm."""
    import timm

    model: Any = None
    model_input = torch.empty(0)
    variants: list[dict[str, Any]] = [{"img_size": 64, "depth": 3}, {"img_size": 64}, {"depth": 3}, {}]
    for smaller in variants:
        torch.manual_seed(0)
        try:
            model = randomized(timm.create_model(name, pretrained=False, **smaller))
            size: Any = smaller.get("img_size") or model.default_cfg["input_size"][-1]
            model_input = torch.randn(1, 3, size, size)
            with torch.no_grad():
                floats(model(model_input))
            break
        except Exception:  # this one cannot be made smaller so
            model = None
    if model is None:
        raise RuntimeError("none of its sizes runs")

    def call(grad: bool = False) -> list[Tensor]:
        with torch.set_grad_enabled(grad):
            return floats(model(model_input))

    return {"class": type(model).__name__, "run": True} | check(model, call)


def smallest_of_timm(module: str) -> dict[str, str]:
    """{kind of attention: smallest variant} of one of timm's files; empty if nothing there attends."""
    import timm

    kinds: dict[str, tuple[int, str]] = {}
    if "attn" not in inspect.getsource(importlib.import_module(f"timm.models.{module}")).lower():
        return {}
    for name in timm.list_models(module=module):
        with torch.device("meta"):
            try:
                model = timm.create_model(name, pretrained=False)
            except Exception:
                continue
        attentions = {
            type(m).__name__ + ("+norms" if isinstance(getattr(m, "q_norm", None), nn.Module)
                                and not isinstance(m.q_norm, nn.Identity) else "")
            for m in model.modules()
            if "Attention" in type(m).__name__ or "Attn" in type(m).__name__ or type(m).__name__ == "XCA"
        }  # fmt: skip
        kind = " ".join(sorted(attentions))
        size = sum(p.numel() for p in model.parameters())
        if attentions and size < kinds.get(kind, (10**12, ""))[0]:
            kinds[kind] = (size, name)
    return {kind: name for kind, (size, name) in kinds.items() if size < 120_000_000}


def in_child(library: str, name: str, pipe: Connection) -> None:
    """One family, in a process of its own; sends a JSON document."""
    resource.setrlimit(resource.RLIMIT_CPU, (TIMEOUT, TIMEOUT + 5))
    warnings.simplefilter("ignore")
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    torch.set_num_threads(1)
    try:
        if library == "timm-list":
            result: Result = {"status": "listed", "variants": smallest_of_timm(name)}
        else:
            result = {"status": "supported"} | (try_timm if library == "timm" else try_transformers)(name)
    except BackboneError as error:
        result = {"status": "refused", "reason": str(error)}
    except AssertionError as error:
        unseen = str(error) in UNSEEN  # no site is between the trial's input and its output
        result = {"status": "inconclusive" if unseen else "broken", "reason": str(error)}
    except Exception as error:
        result = {"status": "not built", "reason": f"{type(error).__name__}: {error}"}
    pipe.send(json.dumps(result))
    pipe.close()
    os._exit(0)


def versions() -> str:
    """Of what a result depends on."""
    import timm
    import transformers

    torch_version = torch.__version__.split("+")[0]
    return f"transformers {transformers.__version__}, timm {timm.__version__}, torch {torch_version}"


def read_log(log: Path | None, work: list[tuple[str, str]]) -> dict[tuple[str, str], Result]:
    """The results in a log that are of the installed versions; what is of others is told, and run again."""
    lines = log.read_text().splitlines() if log is not None and log.exists() else []
    known: dict[tuple[str, str], Result] = {}
    others: Counter[str] = Counter()
    for library, name, result, *made_with in map(json.loads, lines):
        if made_with == [versions()]:
            known[library, name] = result
        elif (library, name) in work:
            others[made_with[0] if made_with else "versions that are not noted"] += 1
    for made_with, count in others.items():
        print(f"{log}: {count} results are of {made_with}, and installed are {versions()}: run again", flush=True)
    return known


def run_all(work: list[tuple[str, str]], jobs: int, log: Path | None) -> dict[tuple[str, str], Result]:
    """Runs (library, family) pairs, ``jobs`` at a time; those in the log are not run again."""
    context = multiprocessing.get_context("fork")
    known = read_log(log, work)
    results: dict[tuple[str, str], Result] = {key: known[key] for key in work if key in known}
    waiting, running = [key for key in reversed(work) if key not in known], {}

    def done(library: str, name: str, result: Result) -> None:
        results[library, name] = result
        print(f"{len(results)}/{len(work)} {library} {name}: {result['status']}", flush=True)
        if log is not None:
            with log.open("a") as file:
                file.write(json.dumps([library, name, result, versions()]) + "\n")

    while waiting or running:
        while waiting and len(running) < jobs:
            library, name = waiting.pop()
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=in_child, args=(library, name, theirs), daemon=True)
            process.start()
            theirs.close()
            running[mine] = (library, name, process, time.monotonic())
        for pipe in wait(list(running), timeout=1):
            library, name, process, _ = running.pop(pipe)  # pyright: ignore
            try:
                done(library, name, json.loads(pipe.recv()))  # pyright: ignore
            except EOFError:
                process.join()
                late = process.exitcode == -signal.SIGXCPU
                reason = f"it takes more than {TIMEOUT} s" if late else "its process died"
                done(library, name, {"status": "not built", "reason": reason})
            process.join()
        for pipe, (library, name, process, since) in list(running.items()):
            if time.monotonic() - since > HANGS:
                process.kill()
                process.join()
                del running[pipe]
                done(library, name, {"status": "not built", "reason": "it hangs"})
    return results


def shape_of(sites: list[dict[str, Any]]) -> str:
    """The classes of attention modules, described for a table cell."""
    parts: list[str] = []
    for (kind, heads, shared, values), count in Counter(
        (s["class"], s["num_heads"], s["num_kv_heads"], s.get("value_dim")) for s in sites
    ).items():
        notes = [f"{heads} heads share {shared}"] if heads != shared else []
        notes += ["values of another width"] if values else []
        parts.append(f"{count} `{kind}`" + (f" ({'; '.join(notes)})" if notes else ""))
    return ", ".join(parts)


def also(result: Result) -> str:
    """The variants of a supported family that are supported too."""
    return "; ".join(what for what, outcome in result.get("variants", {}).items() if outcome == "supported")


def short(reason: str) -> str:
    """A reason without the advice after it, in one table cell."""
    reason = re.sub(r" (Attach to a part|Describe the model|Set it to).*", "", reason.split("\n")[0])
    reason = re.sub(r" from '/.*", "", reason)  # a path of this machine
    return reason.replace("|", "\\|")[:260]


def document(results: dict[tuple[str, str], Result]) -> str:
    """The page."""
    lines = [
        "# Backbones",
        "",
        f"Made by `python -m scripts.make_backbones`, which tries every family; do not edit. {versions()}.",
        "",
        f"Run on {datetime.date.today():%d %B %Y}. Each family was tried with a tiny random model of its default "
        "configuration made small, and with the variants that its configuration offers (kinds of layers, windows, "
        "sharing, switches of attention), one change at a time. A row holds for those configurations, not for every "
        "model of the family. Tried: a closed gate changes no bit (with the default and with eager "
        "attention), an open one changes the output, gradients reach gates and prompts, detaching restores everything.",
        "",
    ]
    for library, title in (("transformers", "transformers"), ("timm", "timm")):
        own = {name: result for (lib, name), result in results.items() if lib == library}
        counts = Counter(result["status"] for result in own.values())
        lines += [f"## {title}", "", "| | families |" if library == "transformers" else "| | variants |", "|---|---|"]
        by_inputs = sum(1 for r in own.values() if r["status"] == "supported" and not r["run"])
        lines.append(f"| supported | {counts['supported']} |")
        if by_inputs:
            lines.append(f"| of these run module by module, for want of generic inputs | {by_inputs} |")
        for status in ("refused", "broken", "inconclusive", "not built"):
            lines.append(
                f"| {status if status != 'not built' else 'not tried: no tiny model of it'} | {counts[status]} |"
            )
        if library == "transformers":
            outcomes = Counter(o.partition(":")[0] for r in own.values() for o in r.get("variants", {}).values())
            lines += [f"| variants of supported families: {o} | {n} |" for o, n in sorted(outcomes.items())]
        heading = "| family | model | backbone | attention | also with |"
        lines += ["", f"### Supported ({title})", "", heading, "|---|---|---|---|---|"]
        for name, r in sorted(own.items()):
            if r["status"] == "supported":
                star = "" if r["run"] else " *"
                reached = "" if r["reached"] == len(r["sites"]) else f"; {r['reached']} reached by the trial's input"
                lines.append(
                    f"| {name}{star} | `{r['class']}` | {r['backbone']} | {shape_of(r['sites'])}{reached} | {also(r)} |"
                )
        for status, heading in (
            ("refused", "Refused"),
            ("broken", "Broken: attached, but the contract does not hold"),
            ("inconclusive", "Inconclusive: attached, closed gate exact, but the trial's input does not reach a site"),
            ("not built", "Not tried"),
        ):
            listed = [(name, r["reason"]) for name, r in sorted(own.items()) if r["status"] == status]
            if status in ("refused", "broken"):
                listed += [
                    (f"{name} with {what}", outcome.partition(": ")[2])
                    for name, r in sorted(own.items())
                    for what, outcome in r.get("variants", {}).items()
                    if outcome.startswith(status)
                ]
            if listed:
                lines += ["", f"### {heading} ({title})", "", "| family | reason |", "|---|---|"]
                lines += [f"| {name} | {short(reason)} |" for name, reason in listed]
        lines.append("")
    lines.append("\\* its attention modules were run one by one on random hidden states.")
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="families of transformers; none of timm then")
    parser.add_argument("--timm-only", nargs="*", help="files of timm; none of transformers then")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "backbones.md")
    parser.add_argument(
        "--log", type=Path, help="raw results, a JSON line each; a second run with the same versions goes on from there"
    )
    arguments = parser.parse_args()
    import timm
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for name in ("llama", "clip", "swin"):  # imports here what every child would import for itself
        try_transformers(name)
    files = [] if arguments.only else (arguments.timm_only or timm.list_modules())
    families = [] if arguments.timm_only else (arguments.only or sorted(MODEL_MAPPING_NAMES))
    results = run_all([("transformers", name) for name in families], arguments.jobs, arguments.log)
    listed = run_all([("timm-list", name) for name in files], arguments.jobs, arguments.log)
    variants = sorted({v for r in listed.values() for v in r.get("variants", {}).values()})
    results |= run_all([("timm", name) for name in variants], arguments.jobs, arguments.log)
    arguments.output.write_text(document(results))


if __name__ == "__main__":
    main()
