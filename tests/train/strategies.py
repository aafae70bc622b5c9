"""Makes runs under strategies, one after the other in one group of processes; see `test_strategies`.

Called by torchrun with a JSON list of runs: output, strategy, options, and whether to resume or evaluate what is there.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from accelerate import Accelerator

from zinit.runs.directory import read_run, write_json
from zinit.runs.evaluate import evaluate_run
from zinit.runs.settings import resolve
from zinit.runs.train import train_run


def main() -> None:
    Accelerator.end_training = lambda self: None  # it would dissolve the group after the first run
    for run in json.loads(sys.argv[1]):
        os.environ["ACCELERATE_USE_FSDP"] = str(run["strategy"] == "fsdp2").lower()
        os.environ["FSDP_VERSION"] = "2"
        os.environ["ACCELERATE_USE_DEEPSPEED"] = str(run["strategy"] == "zero3").lower()
        os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = "3"
        os.environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = "false"
        if run.get("evaluate"):
            write_json(Path(run["output"]) / "evaluated.json", evaluate_run(run["output"]))
            continue
        if run.get("resume"):
            config, _ = read_run(run["output"])
        else:
            config, _ = resolve(backbone="llama", model=run["model"], data=run["data"], options=run["options"])
        train_run(config, run["output"], resume=run.get("resume", False))


if __name__ == "__main__":
    main()
