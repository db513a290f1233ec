#!/bin/bash
# A run on several nodes of a SLURM cluster; it requeues itself when its time limit is reached.
#
#   sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 cluster/slurm.sh +experiment=base_22k data.train=... name=...
#
# One task for each GPU. `fit` reads how many nodes and tasks there are: trainer.devices and num_nodes stay out.
#SBATCH --job-name=beit_pretrain
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Five minutes before the end every task gets SIGUSR1: the step in hand is finished and saved.
#SBATCH --signal=USR1@300

# All nodes must see the data, the code and runs/ at the same place. On a network that NCCL does not find by itself:
# export NCCL_SOCKET_IFNAME=ib0

# The shell stays until the tasks have ended, whatever signals reach it. They end together, or SLURM ends those that are
# left five minutes after the first; never at once, for the first process may still be writing a checkpoint.
trap : USR1 TERM
srun --kill-on-bad-exit=0 --wait=300 python -m beit_pretrain fit "$@"
code=$?

# 75: told to make room, saved, start again. Everything else is an end, good or bad.
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
