"""Templates for launchers: scripts run as their comments say, with launchers that note what they are given."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import config_from_args, parse_args

from tests.shared import ROOT
from zinit.cli import app

LAUNCH = ROOT / "configs" / "launch"
STAND_IN = """#!/usr/bin/env bash
case "$0" in
  */scontrol) printf 'node7\\nnode8\\n';;
  */sbatch) exec "$@";;
  */srun) echo "${SRUN_CPUS_PER_TASK-1}" >"$NOTED.cores"; exec "$@";;
  *) printf '%s\\n' "$@" >"$NOTED";;
esac
"""
SLURM = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "33",
         "SLURM_CPUS_PER_TASK": "32"}  # fmt: skip
RUN = ["--backbone", "llama", "--model", "DIR", "--data", "alpaca.json", "--preset", "alpaca/llama-7b"]


def usage(name: str) -> str:
    """The command in a template's comment."""
    lines = (LAUNCH / name).read_text(encoding="utf-8").splitlines()
    comment = "\n".join(line[1:].strip() for line in lines if line.startswith("#"))
    (found,) = [part for part in comment.split("\n\n") if f"configs/launch/{name}" in part]
    return found.replace("\\\n", " ")


def noted(command: str, folder: Path, **variables: str) -> list[str]:
    """What torchrun is given."""
    for name in ("torchrun", "srun", "scontrol", "sbatch"):
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "NOTED": str(folder / "noted"), **variables}
    subprocess.run(["bash", "-c", command], env=environment, cwd=ROOT, check=True)
    return (folder / "noted").read_text().splitlines()


def read_by_zinit(arguments: list[str]) -> dict[str, Any]:
    """The options as the command line reads them; an unknown one is an error."""
    command, *rest = arguments
    known: Any = typer.main.get_command(app)
    return known.commands[command].make_context(command, rest).params


def test_a_script_starts_processes_on_machines_that_meet_at_one(tmp_path: Path) -> None:
    args = parse_args(noted(usage("torchrun.sh"), tmp_path))
    config, _, _ = config_from_args(args)
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node, config.max_restarts) == (4, 4, 8, 3)
    assert (config.rdzv_backend, config.rdzv_endpoint, config.run_id) == ("c10d", "node1:29500", "zinit")
    assert (args.module, args.training_script) == (True, "zinit")
    assert args.training_script_args == ["train", *RUN, "--output", "/shared/runs/a"]
    read = read_by_zinit(args.training_script_args)
    assert (read["preset"], read["output"]) == ("alpaca/llama-7b", "/shared/runs/a")


def test_a_job_of_slurm_begins_a_run_and_goes_on_with_it(tmp_path: Path) -> None:
    output = tmp_path / "runs"
    command = usage("slurm.sh").replace("sbatch", "sbatch bash").replace("/shared/runs/a", str(output))
    args = parse_args(noted(command, tmp_path, **SLURM))
    config, _, _ = config_from_args(args)
    assert (config.min_nodes, config.nproc_per_node) == (2, 4)
    assert (config.rdzv_endpoint, config.run_id) == ("node7:29500", "33")
    assert args.training_script_args == ["train", *RUN, "--output", str(output)]
    assert (tmp_path / "noted.cores").read_text() == "32\n", "srun does not take them from the job by itself"
    output.mkdir()
    (output / "run.json").write_text("{}")
    again = parse_args(noted(command, tmp_path, **SLURM)).training_script_args
    assert again == ["train", "--resume", "--output", str(output)]
    assert read_by_zinit(again)["resume"]
    with pytest.raises(subprocess.CalledProcessError):
        noted("bash configs/launch/slurm.sh --backbone llama", tmp_path, **SLURM)


def test_accelerate_takes_its_file_as_the_comment_says() -> None:
    program, launch, *arguments = shlex.split(usage("accelerate.yaml").replace("...", shlex.join(RUN)))
    args = launch_command_parser().parse_args(arguments)
    assert (program, launch, args.module, args.training_script) == ("accelerate", "launch", True, "zinit")
    read_by_zinit(args.training_script_args)
    found = load_config_from_file(str(ROOT / args.config_file))
    assert isinstance(found, ClusterConfig)
    assert (found.num_machines, found.num_processes, found.main_process_port) == (4, 32, 29500)
    assert yaml.safe_load((ROOT / args.config_file).read_text()).keys() <= vars(found).keys(), "all of it is known"
