#!/bin/bash
# Train on the GPUs of several machines with Slurm:
#
#     sbatch deploy/slurm_train.sh -f law -p checkpoints s3://bucket/law
#
# What follows the script's name goes to `bgem3-job train`. Before that: set the number of nodes and of GPUs on each
# below, and put the package where all nodes see it (PATH, or `source .venv/bin/activate` here). The run's directory
# should be on a file system that all nodes see; where there is none, `checkpoints` brings a resumed run what it needs.
#SBATCH --job-name=bgem3-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --output=bgem3-train-%j.log
set -euo pipefail

# Machine 0 is the first of the job's nodes; any free port will do.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes%%$'\n'*}
port=$((20000 + SLURM_JOB_ID % 20000))

# One task a node, which starts a process for each GPU. A requeued job goes on from its last checkpoint.
# shellcheck disable=SC2016  # SLURM_NODEID is another one on each node, so the node's shell fills it in
srun --kill-on-bad-exit=1 bash -c '
    head=$1 port=$2 gpus=$3
    shift 3
    exec bgem3-job train -p resume true "$@" --nproc "$gpus" --nnodes "$SLURM_NNODES" \
        --node-rank "$SLURM_NODEID" --rdzv-endpoint "$head:$port" --no-progress
' train "$head" "$port" "${SLURM_GPUS_ON_NODE:-8}" "$@"
