"""Kills a run of the embedded demo at random moments, resumes it each time, and compares its bits with a quiet run's.

    python -m benchmarks.sigkill --kills 20 --processes 1

Most kills come at a random step (and a random instant after it), every fourth at a random moment after the start, so
that loading and resuming are hit too. With several processes either all of them are killed, the launcher included, or
one alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

RESULTS = Path(__file__).parent / "results"
FILES = ("adapter.safetensors", "adapter.json")


def command(arguments: list[str], processes: int) -> list[str]:
    """The command of a run over so many processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return [sys.executable, *launch, "-m", "zinit", "train", *arguments]


def last_step(output: Path) -> int:
    """The last step in the run's log."""
    try:
        lines = (output / "log.jsonl").read_text(encoding="utf-8").splitlines()
        return max(event["step"] for event in map(_event, lines) if event.get("event") == "step")
    except (OSError, ValueError):
        return 0


def _event(line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError:  # torn by a kill
        return {}


def kill(process: subprocess.Popen[bytes], alone: bool, chance: random.Random) -> str:
    """SIGKILL for the whole tree of processes, or for one worker (its launcher then ends the others)."""
    launcher = psutil.Process(process.pid)
    workers = launcher.children(recursive=True)
    victims = [chance.choice(workers)] if alone and workers else [launcher, *workers]
    for victim in victims:
        try:
            victim.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(workers, timeout=60)
    return "one process" if alone and workers else "all"


def digest(output: Path) -> dict[str, str]:
    """SHA-256 of what the run was for."""
    return {name: hashlib.sha256((output / name).read_bytes()).hexdigest() for name in FILES}


def losses(output: Path) -> dict[int, float]:
    """Loss of every step, as logged last."""
    events = map(_event, (output / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return {event["step"]: event["loss"] for event in events if event.get("event") == "step"}


def kill_once(output: Path, arguments: list[str], number: int, given: argparse.Namespace, chance: random.Random) -> Any:
    """Starts or resumes the run, kills it at a random step or (every fourth time) at a random moment; says when."""
    resumes = (output / "run.json").exists()
    if output.exists() and not resumes:
        shutil.rmtree(output)  # killed before the run had begun: there is nothing to resume
    before = last_step(output)
    process = subprocess.Popen(
        command([*(["--resume"] if resumes else arguments), "--output", str(output)], given.processes),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ},
    )  # fmt: skip
    early = number % 4 == 3
    due = time.monotonic() + chance.uniform(0, 8)
    left = given.kills - number
    target = before + chance.randint(1, max(1, 2 * (given.steps - before) // (left + 1) - 1))
    while process.poll() is None and (time.monotonic() < due if early else last_step(output) < target):
        time.sleep(0.002)
    if process.poll() is not None:
        raise SystemExit(f"the run ended before it could be killed: status {process.returncode}, {output.parent}")
    time.sleep(chance.uniform(0, 0.05))
    killed = kill(process, alone=given.processes > 1 and chance.random() < 0.5, chance=chance)
    return {"after_step": last_step(output), "killed": killed, "at": "random time" if early else "random step"}


def parse() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--processes", type=int, default=1)
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--save-every", type=int, default=3)
    options.add_argument("--seed", type=int, default=0, help="of the moments")
    options.add_argument(
        "--output", type=Path, default=None, help="default: benchmarks/results/sigkill-<processes>.json"
    )
    return options.parse_args()


def main() -> None:
    given = parse()
    chance = random.Random(given.seed)
    folder = Path(tempfile.mkdtemp(prefix="sigkill-"))
    settings = {"steps": given.steps, "save_every": given.save_every, "evaluate_every": 0, "batch_size": 8,
                "micro_batch_size": 4, "warmup_steps": given.steps // 10, "task.evaluation_limit": 0,
                "task.held_out": 8}  # fmt: skip
    arguments = ["--backbone", "llama", *(part for k, v in settings.items() for part in ("-o", f"{k}={v}"))]
    quiet, output = folder / "quiet", folder / "killed"
    started = time.monotonic()
    subprocess.run(command([*arguments, "--output", str(quiet)], given.processes), check=True, capture_output=True)
    moments: list[dict[str, Any]] = []
    while len(moments) < given.kills:
        moments.append(kill_once(output, arguments, len(moments), given, chance))
        print(moments[-1], flush=True)
    subprocess.run(command(["--resume", "--output", str(output)], given.processes), check=True, capture_output=True)
    same = {"adapter_bit_equal": digest(output) == digest(quiet), "losses_bit_equal": losses(output) == losses(quiet)}
    result = {
        "kills": moments,
        "processes": given.processes,
        "steps": given.steps,
        "save_every": given.save_every,
        **same,
        "seconds": round(time.monotonic() - started, 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }
    path = given.output or RESULTS / f"sigkill-{given.processes}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "kills"}, indent=2))
    if not all(same.values()):
        raise SystemExit(f"the run differs from the quiet one: {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
