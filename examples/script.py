# /// script
# requires-python = ">=3.11"
# dependencies = ["zinit"]
#
# [tool.uv.sources]
# zinit = { path = ".." }
# ///
"""A whole run in one file that brings its dependencies: training, evaluation, report.

    uv run examples/script.py

No package index has zinit: elsewhere than in this folder, let ``tool.uv.sources`` say where a checkout of it is,
``path = "/where/zinit/is"`` or ``git = "https://..."``.
"""

from zinit.runs.settings import resolve
from zinit.runs.train import train_run


def main(output="run", steps=20):
    """Trains the embedded demo; what ``metrics.json`` holds."""
    config, preset = resolve(backbone="llama", options=[f"train.steps={steps}", "task.evaluation_limit=8"])
    results = train_run(config, output, preset=preset)
    for name, metrics in results["metrics"].items():
        print(f"{name:8} loss {metrics['loss']:.3f}")
    print(f"The report is {output}/report.html; talk to it: zinit chat {output}")
    return results


if __name__ == "__main__":
    main()
