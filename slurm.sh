#!/usr/bin/env bash
# Train on Slurm, over any number of nodes and consecutive jobs:
#   sbatch slurm.sh --scale B --res 128 --out out/litevae-b-128
# Two minutes before the time limit (or when the job is preempted with USR1), every process finishes its step,
# rank 0 saves a checkpoint, and the job requeues itself; the next job resumes from that checkpoint.
#SBATCH --job-name=litevae
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

stopped=0
trap 'stopped=1; kill -USR1 "$run"' USR1      # srun forwards it to torchrun, and torchrun to train.py

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="$SLURM_GPUS_ON_NODE" \
    --rdzv-backend=c10d --rdzv-endpoint="$head:${MASTER_PORT:-29500}" --rdzv-id="$SLURM_JOB_ID" \
    --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout=100 \
    train.py "$@" --resume &
run=$!
wait "$run"
code=$?
while kill -0 "$run" 2>/dev/null; do          # the trap interrupts the first wait
    wait "$run"
    code=$?
done

if [ "$stopped" = 1 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
