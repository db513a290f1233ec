"""What runs a training: trainer, optimiser, checkpoints, resume, preemption, processes, sweeps."""
