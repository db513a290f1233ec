"""A simulated crash."""

from lightning import Callback


class Crash(Callback):
    """Raises after a given optimizer step, before the next one begins."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise RuntimeError("power cut")
