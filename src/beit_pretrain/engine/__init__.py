"""The training engine: trainer, optimiser, checkpoints, resume, preemption, distributed processes, sweeps."""
