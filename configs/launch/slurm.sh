#!/usr/bin/env bash
# A run under SLURM: one torchrun on each node, which starts a process for each of its GPUs.
#
#   sbatch configs/launch/slurm.sh --backbone llama --model DIR --data alpaca.json --preset alpaca/llama-7b \
#       --output /shared/runs/a
#
# What follows the script's name is given to zinit train; --output is a folder that all nodes see. Submitted again after
# its time was over, or requeued, the job goes on from the last checkpoint: SLURM says so two minutes before, and the
# run saves. Change the lines below to what the cluster has, and activate the environment that holds zinit.
#SBATCH --job-name=zinit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --output=%x-%j.log
set -euo pipefail

# . /shared/venv/bin/activate

output=""
for ((i = 1; i < $#; i++)); do
  if [ "${!i}" = --output ]; then next=$((i + 1)); output="${!next}"; fi
done
[ -n "$output" ] || { echo "say where the run goes, a folder that all nodes see: --output DIR" >&2; exit 2; }
if [ -e "$output/run.json" ]; then set -- --resume --output "$output"; fi

export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"  # since SLURM 22.05 srun takes no other, and gives one core
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
exec srun torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
  --rdzv-backend c10d --rdzv-endpoint "${nodes[0]}:29500" --rdzv-id "$SLURM_JOB_ID" \
  -m zinit train "$@"
