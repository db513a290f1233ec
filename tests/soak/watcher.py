"""Lightning callbacks that the soak tests install: they record what a run trains on and inject failures.

WATCH=FILE      a JSON line for every micro-batch: step, processes, positions, a digest of each image
POISON=7        the gradients of step 7 (from 0) become NaN; POISON=7- those of all steps from there on
LEAVE_OUT=7     step 7 has no gradients at all: the optimiser passes over it
"""

from __future__ import annotations

import json
import os
from hashlib import sha256

from lightning import Callback


def callbacks() -> list[Callback]:
    return [Watcher()] if {"WATCH", "POISON", "LEAVE_OUT"} & os.environ.keys() else []


class Watcher(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if "WATCH" not in os.environ:
            return
        images = [sha256(image.cpu().numpy().tobytes()).hexdigest()[:16] for image in batch["image"]]
        record = {"step": trainer.global_step, "world": trainer.world_size, "images": images}
        line = json.dumps({**record, "positions": batch["position"].tolist()}) + "\n"
        file = os.open(os.environ["WATCH"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(file, line.encode())  # in one piece, whichever process
        os.close(file)

    def on_after_backward(self, trainer, pl_module) -> None:
        step, on, _ = os.environ.get("POISON", "1000000").partition("-")
        if trainer.global_step == int(step) or (on and trainer.global_step > int(step)):
            next(p for p in pl_module.parameters() if p.grad is not None).grad.fill_(float("nan"))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.global_step == int(os.environ.get("LEAVE_OUT", "-1")):
            for parameter in pl_module.parameters():
                parameter.grad = None
