"""Runs of a benchmark on a Ray cluster: as far as that can be seen without one, and on one of two machines."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.bench.test_bench import FAKE, TWO, started
from zinit.bench import ray as places
from zinit.bench.place import Ended
from zinit.bench.plan import Benchmark, make_benchmark
from zinit.bench.ray import Cluster, run_here
from zinit.bench.runner import Event, Runner, final_cells, read_cells
from zinit.errors import ConfigError
from zinit.files import OWNER
from zinit.ui.benchmark import run_benchmark

pytestmark = pytest.mark.integration


def plan_of(folder: Path, *options: str) -> Benchmark:
    """Six cells."""
    (folder / "bench.toml").write_text(TWO.replace('methods = ["zero-init"]\nvary', "vary"))
    return make_benchmark(
        config_file=str(folder / "bench.toml"), methods=["zero-init", "random-gate"], seeds=[0], options=options
    )


class Lost(Exception):
    pass


class Cancelled(Exception):
    pass


class Broken(Exception):
    pass


class Stand:
    """As much of the package ``ray`` as is asked for: tasks are run where they are waited for, and may be lost."""

    exceptions = SimpleNamespace(
        WorkerCrashedError=Lost, NodeDiedError=Lost, OutOfMemoryError=Lost, ObjectLostError=Lost,
        TaskCancelledError=Cancelled, RayTaskError=Broken,
    )  # fmt: skip

    def __init__(self, resources: dict[str, float], losses: int = 0) -> None:
        self.resources, self.losses, self.asked = resources, losses, {}
        self.cancelled: list[Any] = []

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def remote(self, function: Any) -> Any:
        def options(**asked: Any) -> Any:
            self.asked = asked
            return SimpleNamespace(remote=lambda *arguments: lambda: function(*arguments))

        return SimpleNamespace(options=options)

    def get(self, task: Any) -> Any:
        if task in self.cancelled:
            raise Cancelled
        if self.losses:
            self.losses -= 1
            raise Lost("the node died\nand more")
        return task()

    def cancel(self, task: Any) -> None:
        self.cancelled.append(task)


def cluster_of(stand: Stand, folder: Path, monkeypatch: pytest.MonkeyPatch, jobs: int | None = None) -> Cluster:
    monkeypatch.setattr(places, "connected", lambda: stand)
    return Cluster(folder, jobs)


def test_a_run_takes_a_gpu_where_there_are_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for resources, jobs, expected, gpus in (
        ({"CPU": 24.0}, None, 24, 0),
        ({"CPU": 64.0, "GPU": 8.0}, None, 8, 1),
        ({"CPU": 64.0, "GPU": 8.0}, 3, 3, 1),
        ({}, None, 1, 0),
    ):
        stand = Stand(resources)
        assert cluster_of(stand, tmp_path, monkeypatch, jobs).jobs == expected
        assert stand.asked == {"num_cpus": 1, "num_gpus": gpus, "max_retries": 0}


def test_a_run_whose_machine_is_lost_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    begun: list[int] = []

    def command() -> list[str]:
        begun.append(len(begun))
        return ["python", "-c", "import os, sys; print(os.environ['WHAT']); sys.exit(3)"]

    cluster = cluster_of(Stand({"CPU": 1}, losses=2), tmp_path, monkeypatch)
    assert cluster.run(command, {"WHAT": "yes"}, told.append) == Ended(status=3, out=b"yes\n")
    assert (len(begun), told) == (3, ["its machine was lost, it goes on elsewhere: the node died"] * 2)
    ended = cluster_of(Stand({"CPU": 1}, losses=9), tmp_path, monkeypatch).run(command, {}, told.append)
    assert ended == Ended(status=1, err=b"zinit: its machine was lost 3 times")
    cluster.stop()
    assert cluster.run(command, {}, told.append) is None


def test_a_machine_that_cannot_run_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = cluster_of(Stand({"CPU": 1}), tmp_path, monkeypatch)

    def broken(task: Any) -> Any:
        raise Broken("ray::run_here() (pid=1)\nRuntimeError: ...\n\nModuleNotFoundError: No module named 'zinit'\n")

    monkeypatch.setattr(Stand, "get", lambda self, task: broken(task))
    ended = cluster.run(lambda: ["python"], {}, lambda text: None)
    assert ended is not None
    text = b"zinit: a machine of the cluster cannot run it: ModuleNotFoundError: No module named 'zinit'"
    assert (ended.status, ended.err) == (1, text)


def test_a_machine_without_the_folder_says_so(tmp_path: Path) -> None:
    found = run_here([sys.executable, "-c", ""], {}, str(tmp_path), str(tmp_path / "out"))
    assert found["status"] == 2
    text = found["err"].decode()
    assert text.startswith("zinit: the machine ")
    assert f"has no folder {tmp_path / 'out'}. Start the benchmark in a folder that all machines share" in text


def test_what_another_machine_left_claimed_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(plan_of(tmp_path), tmp_path / "out", jobs=1, launcher=FAKE)
    run = tmp_path / "out" / "runs" / "one"
    run.mkdir(parents=True)
    (run / "run.json").touch()
    (run / OWNER).write_text('{"host": "node7", "process": 1}')
    cell = final_cells(runner.benchmark, tmp_path / "none")[0]
    assert "--resume" in runner._command(cell, run)
    assert (run / OWNER).exists()  # on this machine alone the lock tells, and so does whoever resumes it by hand
    monkeypatch.setattr(runner.place, "many_machines", True, raising=False)
    assert "--resume" in runner._command(cell, run)
    assert not (run / OWNER).exists()


def test_places_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="runs --on local or --on ray; got 'mars'"):
        run_benchmark(plan_of(tmp_path), tmp_path / "out", on="mars")
    found = importlib.util.find_spec
    monkeypatch.setattr(places, "find_spec", lambda name: None if name == "ray" else found(name))
    with pytest.raises(ConfigError, match=r"--on ray needs ray\. .*pip install -e '\.\[ray\]'"):
        run_benchmark(plan_of(tmp_path), tmp_path / "out", on="ray")
    assert not (tmp_path / "out").exists()


# --- a cluster of two machines in one, by Ray's own tools for tests ---------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pytest.importorskip("ray", reason="needs the package ray")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "RAY_USAGE_STATS_ENABLED": "0",
            "FAKE_JOURNAL": str(tmp_path_factory.mktemp("ray") / "journal"),
            "FAKE_SECONDS": "1.5",
            "FAKE_SAVING": "0.5",
        }.items():
            patch.setenv(name, value)  # of all machines: they are started here
        from ray.cluster_utils import Cluster as Machines

        made = Machines(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        patch.setenv("RAY_ADDRESS", made.address)
        yield made
        import ray

        ray.shutdown()
        made.shutdown()


@pytest.fixture
def second(cluster: Any) -> Iterator[Any]:
    """The second machine, which has begun to work."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = cluster.add_node(num_cpus=1, env_vars={"FAKE_MACHINE": "second"})
    cluster.wait_for_nodes()
    ray = places.connected()
    there = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
    ray.get(ray.remote(lambda: None).options(num_cpus=1, scheduling_strategy=there).remote())
    yield node
    if node in cluster.list_all_nodes():
        cluster.remove_node(node)


def journal() -> Path:
    return Path(os.environ["FAKE_JOURNAL"])


def running(runner: Runner) -> threading.Thread:
    thread = threading.Thread(target=runner.run)
    thread.start()
    return thread


def wait_for(what: Any) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_machine_that_dies_loses_no_finished_cell(
    cluster: Any, second: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan, out = plan_of(tmp_path), tmp_path / "out"
    events: list[Event] = []
    before = len(started(journal()))
    runner = Runner(plan, out, place=Cluster(out), launcher=FAKE, on_event=events.append)
    capfd.readouterr()
    assert runner.jobs == 2
    thread = running(runner)

    def at_work() -> set[str]:
        """Cells that run on the second machine."""
        begun = {entry["cell"] for entry in started(journal())[before:] if entry["machine"] == "second"}
        return begun - {path.stem for path in out.glob("cells/*.json")}

    wait_for(lambda: len(list(out.glob("cells/*.json"))) >= 2 and at_work())
    finished = {path.name: path.read_bytes() for path in out.glob("cells/*.json")}
    cut_off = at_work()
    cluster.remove_node(second, allow_graceful=False)
    thread.join(120)
    assert not thread.is_alive()
    assert {cell["status"] for cell in read_cells(out)} == {"done"}
    assert len(read_cells(out)) == 6
    assert all((out / "cells" / name).read_bytes() == data for name, data in finished.items())
    entries = started(journal())[before:]
    assert [entry["cell"] for entry in entries if entry["resumed"]] == list(cut_off), "the other machine went on"
    assert len(entries) == 7
    (lost,) = [event["text"] for event in events if event["event"] == "notice"]
    assert lost.startswith(f"{next(iter(cut_off))}: its machine was lost, it goes on elsewhere")
    Runner(plan, out, place=Cluster(out), launcher=FAKE).run()
    assert len(started(journal())) == before + 7, "the same command finds all done"
    assert capfd.readouterr() == ("", "")


def test_asked_to_stop_runs_of_all_machines_save(cluster: Any, second: Any, tmp_path: Path) -> None:
    plan, out = plan_of(tmp_path, "fake.seconds=30"), tmp_path / "out"
    before = len(started(journal()))
    runner = Runner(plan, out, place=Cluster(out, jobs=4), launcher=FAKE)  # two of them wait for a machine
    thread = running(runner)
    wait_for(lambda: len(started(journal())) == before + 2)
    runner.stop()
    thread.join(60)
    assert not thread.is_alive()
    assert read_cells(out) == []
    assert len(list(out.glob("runs/*/saved"))) == 2, "both had the time to save"
    assert len(started(journal())) == before + 2
