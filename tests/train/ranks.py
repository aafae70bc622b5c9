"""What two processes do in one launch: runs that they disagree about, and a toy task; see `test_ranks`.

Called by torchrun with a folder that holds ``cases.json``: by name, the run of rank 0 and what is different on rank 1.
Each rank writes ``rank-N.json``: by name, the message that refused the run; and what the toy's steps measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from tests.train.test_fit import Regression, losses, norms
from tests.train.test_fit import run as fit_regression
from zinit.errors import ConfigError
from zinit.runs.evaluate import evaluate_run
from zinit.runs.settings import resolve
from zinit.runs.train import train_run

# 22 examples in steps of 7: the last step of an epoch has one, and the second process nothing that counts.
TOY: dict[str, Any] = {"batch_size": 7, "micro_batch_size": 3, "epochs": 2}


def toy() -> dict[str, Any]:
    """What the toy task's steps measured, and what came of them."""
    task = Regression()
    events = fit_regression(task, **TOY)
    return {"losses": losses(events), "norms": norms(events), "weights": task.model.get_parameter("2.weight").tolist()}


def main() -> None:
    torch.set_num_threads(1)
    Accelerator.end_training = lambda self: None  # it would dissolve the group after the first run
    folder, rank = Path(sys.argv[1]), Accelerator(cpu=True).process_index
    found: dict[str, Any] = {"toy": toy()}
    for name, (given, other) in json.loads((folder / "cases.json").read_text()).items():
        own = {**given, **(other if rank else {})}
        config, _ = resolve(backbone="llama", **{k: own[k] for k in ("model", "data", "seed", "options") if k in own})
        try:
            train_run(config, own.get("output", str(folder / "runs" / name)), resume=own.get("resume", False))
            found[name] = "trained"
        except ConfigError as error:
            found[name] = str(error)
    try:
        evaluate_run(folder / "runs" / "places", data=str(folder / ("other.json" if rank else "data.json")), limit=0)
    except ConfigError as error:
        found["evaluation"] = str(error)
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
