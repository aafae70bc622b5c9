"""Stands in for ``zinit train`` in the tests of the benchmark: notes that it ran, and what it was asked for."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    arguments = sys.argv[2:]
    output = Path(arguments[arguments.index("--output") + 1])
    resumed = "--resume" in arguments
    said = json.loads((output / "run.json").read_text())["said"] if resumed else arguments
    options = dict(said[i + 1].split("=", 1) for i, part in enumerate(said) if part == "-o")
    seed = int(said[said.index("--seed") + 1])
    rate = float(options.get("train.learning_rate", 1))
    output.mkdir(parents=True, exist_ok=True)
    config = {"train": {"learning_rate": rate, "rates": {"gates": 0.5, "head": 1.0}}}
    (output / "run.json").write_text(json.dumps({"said": said, "device": "cpu", "config": config}))
    (output / "log.jsonl").write_text(
        "".join(json.dumps({"event": "step", "step": step, "loss": 1 / step}) + "\n" for step in range(1, 5)) + '{"torn'
    )

    def stop(number: int, frame: object) -> None:
        time.sleep(float(os.environ.get("FAKE_SAVING", "0")))
        (output / "saved").touch()
        sys.exit(130)

    signal.signal(signal.SIGTERM, stop)  # before anybody can see that it runs
    where = {"machine": os.environ.get("FAKE_MACHINE", "")}
    with Path(os.environ["FAKE_JOURNAL"]).open("a") as journal:
        journal.write(
            json.dumps({"cell": os.environ["ZINIT_BENCH_CELL"], "resumed": resumed, **where, "pid": os.getpid()}) + "\n"
        )

    if "warm_start" in options and not (Path(options["warm_start"]) / "done").exists():
        raise RuntimeError("a start that has not finished")
    method = options["method"]
    if method == "bitfit":
        print("zinit: there are no bias terms.", file=sys.stderr)
        print(json.dumps({"error": "there are no bias terms.", "by_settings": True}))
        sys.exit(2)
    if method == "head-only" and not Path(os.environ["FAKE_JOURNAL"] + ".mended").exists():
        print("zinit: no space left on device", file=sys.stderr)
        print(json.dumps({"error": "no space left on device", "by_settings": False}))
        sys.exit(2)
    if method == "full" and not Path(os.environ["FAKE_JOURNAL"] + ".mended").exists():
        raise RuntimeError("a fault")
    time.sleep(float(options.get("fake.seconds", os.environ.get("FAKE_SECONDS", "0"))))
    score = {"zero-init": 0.8, "random-gate": 0.5}.get(method, 0.1) + seed / 100 - abs(rate - 3) / 10
    score -= {"random-gate": seed * seed / 50}.get(method, 0.0)
    metrics = {"frozen": {"accuracy": 0.1, "loss": 4.0}, "adapted": {"accuracy": score, "loss": 2 - 2 * score}}
    counts = {"held_out": 50}
    (output / "done").touch()
    print(json.dumps({"metrics": metrics, "counts": counts, "num_trainable": 7, "steps": 4, "seconds": 0.5}))


main()
