"""Cache retrieval: time per query and memory for 10,000, 100,000 and 1,000,000 keys, and equality with faiss flat.

python -m benchmarks.retrieval            # 2.1 GB of disk for the largest; results/retrieval-cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import RESULTS
from zinit.encoders.retrieval import FeatureIndex

BLOCK = 4096


def blocks(count: int, width: int) -> Iterator[np.ndarray]:
    random = np.random.default_rng(0)
    for start in range(0, count, BLOCK):
        yield random.standard_normal((min(BLOCK, count - start), width), dtype=np.float32)


def measure(folder: Path, count: int, width: int, rounds: int) -> dict[str, Any]:
    begun = time.perf_counter()
    index = FeatureIndex.build(folder, blocks(count, width), count=count, width=width)
    found: dict[str, Any] = {"keys": count, "file_mb": index.keys.nbytes / 1e6, "build_s": time.perf_counter() - begun}
    queries = torch.nn.functional.normalize(torch.randn(16, width), dim=1)
    index.mix(queries[:1])
    for batch in (1, 16):
        walls, cpus = [], []
        for _ in range(rounds):
            begun, used = time.perf_counter(), time.process_time()
            index.mix(queries[:batch])
            walls.append((time.perf_counter() - begun) / batch)
            cpus.append((time.process_time() - used) / batch)
        found[f"ms_per_query_batch_{batch}"] = 1000 * statistics.median(walls)
        found[f"cpu_ms_per_query_batch_{batch}"] = 1000 * statistics.median(cpus)
    return {**found, **resident()}


def resident() -> dict[str, float]:
    """Memory of the process: its own, and that of the mapped file, which the system may take back at any time."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
    return {"own_mb": kilobytes["RssAnon"] / 1000, "mapped_mb": kilobytes["RssFile"] / 1000}


def compare(folder: Path, width: int) -> dict[str, Any]:
    """Against faiss flat: on the keys as they are rounded, and on those that were given."""
    import faiss

    index, library = FeatureIndex.open(folder), faiss
    queries = torch.nn.functional.normalize(torch.randn(64, width), dim=1)
    scores, places = index.search(queries, 10)
    found: dict[str, Any] = {"keys": len(index)}
    given = torch.nn.functional.normalize(torch.from_numpy(np.concatenate(list(blocks(len(index), width)))), dim=1)
    for name, keys in (("float16", np.asarray(index.keys, dtype=np.float32)), ("float32", given.numpy())):
        flat: Any = library.IndexFlatIP(width)
        flat.add(keys)
        theirs, where = (torch.from_numpy(each) for each in flat.search(queries.numpy(), 10))
        different = places != where
        tied = (scores - theirs).abs() < 1e-6
        values = torch.from_numpy(keys)[where]
        near = torch.nn.functional.normalize(((20 * theirs).softmax(1)[..., None] * values).sum(1), dim=1)
        mixed = torch.nn.functional.normalize(0.5 * queries + 0.5 * near, dim=1)
        found[name] = {
            "other_ids_but_for_ties": int((different & ~tied).sum()),
            "largest_difference_of_mixed": float((index.mix(queries) - mixed).abs().max()),
        }
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--keys", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    options.add_argument("--width", type=int, default=1024)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--output", type=Path, default=RESULTS / "retrieval-cpu.json")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    results: dict[str, Any] = {
        "width": given.width, "threads": given.threads, "torch": torch.__version__, "machine": platform.machine(),
        "load_average": os.getloadavg()[0], "sizes": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for count in given.keys:
            results["sizes"].append(measure(Path(folder) / str(count), count, given.width, given.rounds))
            print(json.dumps(results["sizes"][-1]), flush=True)
        if 100_000 in given.keys and find_spec("faiss"):
            results["faiss"] = compare(Path(folder) / "100000", given.width)
            print(json.dumps(results["faiss"]), flush=True)
    given.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
