"""A power cut for tests."""

from lightning import Callback


class Crash(Callback):
    """Dies after a given optimiser step, before anything of the next one."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise RuntimeError("power cut")
