#!/usr/bin/env bash
# A run on GPU nodes under Slurm: `sbatch slurm_gpu.sh`, in a folder that all nodes share and that
# holds resnet50.pth and a virtual environment with `pip install "ait_jax[cuda13]"`. Not run on real
# hardware yet.
#SBATCH --job-name=ait
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=ait-%j.log
# A task for each GPU: so JAX expects it under Slurm, which tells it of the others. Three minutes
# before its time is up the job's tasks get SIGTERM: they save, and end with 143.
set -euo pipefail
source .venv/bin/activate

code=0
srun --kill-on-bad-exit=1 ait-jax main --config=imagenet_resnet50:gdfq,ait,w4a4 \
  --workdir="$PWD/runs/r50_w4a4" --config.teacher.weights=resnet50.pth \
  --config.data.name=none --config.train.batch_size=128 || code=$?
# Saved and stopped, or another process died (docs/reliability.md): back into the queue, to go on.
if [[ $code -eq 143 || $code -eq 134 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
