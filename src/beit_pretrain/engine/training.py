"""Training from Python, as in a notebook: `fit` does what the verb does, `compose` gives its parts first."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer

from beit_pretrain.data.datamodule import ShardData
from beit_pretrain.engine import distributed as cluster
from beit_pretrain.engine.dist_env import is_child, launched
from beit_pretrain.engine.fit import build, preemptible, run, set_process, validation_metrics
from beit_pretrain.engine.keywords import fit_settings
from beit_pretrain.engine.metrics import last_metrics
from beit_pretrain.engine.module import TrainedModule
from beit_pretrain.engine.preflight import run_summary
from beit_pretrain.engine.resume import find_resume
from beit_pretrain.engine.run_folder import finished_step
from beit_pretrain.engine.settings import FitSettings
from beit_pretrain.engine.trainer import silence_warnings
from beit_pretrain.errors import UserError
from beit_pretrain.models.checkpoints import files as checkpoint


class Training:
    """A run with its parts: `module, data, trainer = training`. `fit` trains it; so does `trainer.fit(module, data)`.

    Attributes:
        settings: validated.
        module, data, trainer: Lightning's three parts. The network is `module.model`; of a run that has a checkpoint,
            `fit` loads it.
        metrics: the last value of each metric, and the step, after `fit`.
    """

    def __init__(self, settings: FitSettings, callbacks: Sequence[Callback] | Callback = ()):
        self.settings, self.metrics = settings, dict[str, float]()
        self._callbacks = [callbacks] if isinstance(callbacks, Callback) else list(callbacks)
        if other := [each for each in self._callbacks if not isinstance(each, Callback)]:
            raise UserError(f"callbacks are objects of lightning.Callback, not {other[0]!r}")
        self._running = False
        check_devices(settings)
        self._build()

    def _build(self) -> None:
        silence_warnings()
        with restored_process():
            self._built = build(self.settings, self._callbacks)
        self._random = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        self._started = False
        self.module: TrainedModule = self._built.task.module
        self.data: ShardData = self._built.task.data
        self.trainer: Trainer = self._built.trainer
        self.trainer.fit = self._by_hand  # type: ignore[method-assign]
        self.trainer.validate = self._validate  # type: ignore[method-assign, assignment]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.module, self.data, self.trainer))

    def __repr__(self) -> str:
        return run_summary(self.settings, self._built.task, self._built.steps, self.trainer)

    def fit(self) -> Training:
        """Train, or resume, and return itself, as the verb `fit` does: with its checks, files and errors.

        After an interruption, call it again to resume; module, data and trainer are then new ones.

        Raises UserError, with one line; after saving, KeyboardInterrupt on Ctrl-C and SystemExit(75) on SIGTERM or
        SIGUSR1. In another thread than the main one, signals are left to the main thread.
        """
        cfg = self.settings
        if self._started:
            if self.trainer.global_step:  # resume=never holds for the first start only
                cfg.resume = "auto"
            self._build()
        self._started = self._running = True
        try:
            with restored_process(), preemptible(cfg, exits=bool(launched()) or is_child()) as signals:
                set_process(cfg)
                torch.set_rng_state(self._random[0])
                torch.cuda.set_rng_state_all(self._random[1])
                torch._dynamo.reset()  # else it compiles a function only for the first 8 runs of a process
                start = self._built.start = find_resume(cfg, cfg.folder / "checkpoints")  # it may be newer by now
                run(self._built, signals)
        finally:
            self._running = False
        if start.path and finished_step(cfg.folder) == start.step:  # nothing was left to do
            _, state, _ = checkpoint.read_own(start.path, self.module.kind)
            checkpoint.load_exactly(self.module.model, state, start.path)
        self.metrics = last_metrics(cfg.folder / "metrics.csv")
        return self

    def _by_hand(self, *parts: Any, **named: Any) -> None:
        """`trainer.fit` of the composed trainer."""
        if self._running:
            Trainer.fit(self.trainer, *parts, **named)
        elif self._started:  # `fit` makes new parts to resume: these would silently stay as they are
            raise UserError("this trainer has run; compose the training again, or call its fit(), which resumes")
        elif [id(part) for part in (*parts, *named.values()) if part is not None] == [id(self.module), id(self.data)]:
            self.fit()
        else:
            raise UserError(
                "this trainer trains what was composed with it: trainer.fit(module, data); for other parts make a "
                "lightning.Trainer"
            )

    def _validate(self, *parts: Any, **named: Any) -> list[dict[str, float]]:
        """`trainer.validate` with the metrics: Lightning returns only what it sends to loggers itself."""
        Trainer.validate(self.trainer, *parts, **named)
        return [validation_metrics(self.trainer)]


def compose(
    experiment: str, overrides: Sequence[str] = (), *, callbacks: Sequence[Callback] | Callback = (), **settings: Any
) -> Training:
    """Build an experiment's module, data module and trainer: `module, data, trainer = compose("base_22k", ...)`.

    Args:
        experiment: a name in conf/experiment, such as small_own.
        overrides: words of the command line, such as ["optim.lr=1e-3", "logger=wandb"].
        callbacks: Lightning callbacks beside the run's own.
        settings: by keyword, with _ for the dot: data_train="DATA/train", optim_lr=1e-3. Groups may be dictionaries,
            optim={"lr": 1e-3}; **{"optim.lr": 1e-3} works too. Values arrive as they are: a text is never a number, a
            list or an interpolation.

    Raises UserError, with one line, as the command line does.
    """
    return Training(fit_settings(experiment, overrides, settings), callbacks)


def fit(
    experiment: str, overrides: Sequence[str] = (), *, callbacks: Sequence[Callback] | Callback = (), **settings: Any
) -> Training:
    """Train an experiment, as the verb `fit` does: `fit("small_own", data_train="DATA/train")`; see `compose`."""
    return compose(experiment, overrides, callbacks=callbacks, **settings).fit()


def check_devices(cfg: FitSettings) -> None:
    """Raise UserError where a run would start further processes and cannot: they run the program's file anew."""
    if launched() or is_child() or not is_interactive():
        return
    count = cluster.device_count(cfg.trainer.devices, cluster.visible_gpus(cfg.trainer.accelerator))
    if count > 1:
        raise UserError(
            f"trainer.devices={cfg.trainer.devices} means {count} processes, which a notebook cannot start; set "
            "trainer_devices=1, or train with the command python -m beit_pretrain fit, or from a script"
        )


def is_interactive() -> bool:
    """Whether this program is no file that could be run anew: a notebook, a shell, `python -c`."""
    return hasattr(sys, "ps1") or not Path(getattr(sys.modules["__main__"], "__file__", None) or "").is_file()


@contextmanager
def restored_process() -> Iterator[None]:
    """Restore at the end what a training sets for the whole process, but for random states and environment."""
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    dynamo: Any = torch._dynamo.config
    kept = {name: getattr(dynamo, name) for name in ("suppress_errors", "optimize_ddp")}
    try:
        with dynamo.patch(**kept):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = benchmark
        torch.use_deterministic_algorithms(strict, warn_only=warns)
