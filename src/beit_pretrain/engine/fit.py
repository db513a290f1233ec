"""The verbs `fit` and `validate`: run a composed config.

A run's folder holds `config.yaml`, `metrics.csv`, `pictures/`, `checkpoints/` and, if needed, `replaced.jsonl` (corrupt
images) and `skipped.jsonl` (steps with a non-finite gradient).
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from beit_pretrain.config import as_user_errors
from beit_pretrain.data.corrupt_images import CorruptImages
from beit_pretrain.engine import distributed as cluster
from beit_pretrain.engine import speed
from beit_pretrain.engine.callbacks import ProgressBar, Throughput
from beit_pretrain.engine.checkpointing import LAST, CheckpointManager
from beit_pretrain.engine.compile import CompileReport
from beit_pretrain.engine.dist_env import is_child, is_restarted
from beit_pretrain.engine.metrics import is_first_process
from beit_pretrain.engine.nonfinite_guard import NonFiniteGuard
from beit_pretrain.engine.preemption import PREEMPTED, Preempted, PreemptionSignals
from beit_pretrain.engine.preflight import fit_for_fsdp, preflight, run_summary, sources
from beit_pretrain.engine.resume import ResumeState, check_same_data, find_resume, load_run, open_folder, restore_config
from beit_pretrain.engine.run_folder import REPLACED, SKIPPED, exclusive_lock, finished_step, mark_finished
from beit_pretrain.engine.settings import FitSettings, ValidateSettings
from beit_pretrain.engine.task import Task, find_task
from beit_pretrain.engine.trainer import make_trainer, silence_warnings, total_steps, wanted_gpu
from beit_pretrain.errors import UserError, first_line
from beit_pretrain.processes import end_with_parent
from beit_pretrain.settings import to_dict


@dataclass
class BuiltRun:
    """What `build` makes of a config: a run that has not started."""

    cfg: FitSettings
    task: Task
    trainer: Trainer
    start: ResumeState
    steps: int  # of the whole run
    agreement: cluster.RankConsistencyCheck


def fit(cfg: FitSettings) -> dict[str, float]:
    """Train, or resume, the run that the config describes; returns the last validation metrics.

    After saving, raises KeyboardInterrupt on Ctrl-C and SystemExit(75) on SIGTERM or SIGUSR1.
    """
    with preemptible(cfg) as signals:
        return run(build(cfg), signals)


@contextmanager
def preemptible(cfg: FitSettings, exits: bool = True) -> Iterator[PreemptionSignals]:
    """Handle signals, and hold the lock of the run's folder, in a `with` block; raises as `fit` does.

    `exits`: whether the process ends with the run.
    """
    silence_warnings()
    if is_child():
        end_with_parent()
    if is_restarted():  # resume=never holds for the first start of a job only
        cfg.resume = "auto"

    def on_exit(stopped: Preempted) -> int:
        if is_first_process():
            saved = "" if stopped.step is None else f", saved {cfg.folder / 'checkpoints' / LAST}"
            same = f"the same command{' without resume=never' if cfg.resume == 'never' else ''}"
            print(f"{stopped}{saved}; rerun {same} to resume{' from there' * bool(saved)}", flush=True)
        if is_child():  # only the exit code of the parent process matters
            return 0
        return 130 if stopped.signum == signal.SIGINT else PREEMPTED

    # Lock before reading the folder: a run that is about to exit may still write to it. A new folder is made, and
    # locked, after the preflight checks.
    locks = is_first_process() and cfg.preflight != "only" and cfg.folder.is_dir()
    try:
        with PreemptionSignals(on_exit, exits) as signals, exclusive_lock(cfg.folder, locks):
            yield signals
    except Preempted as stopped:
        code = on_exit(stopped)
        if stopped.signum == signal.SIGINT and code:
            raise KeyboardInterrupt from None
        raise SystemExit(code) from None


def build(cfg: FitSettings, callbacks: Sequence[Callback] = ()) -> BuiltRun:
    """Build the task and the trainer, from the run's checkpoint if there is one; `callbacks`: further ones."""
    folder = cfg.folder / "checkpoints"
    with as_user_errors():
        kind = find_task(cfg.task)
        set_process(cfg)
        seed_everything(cfg.seed, workers=True, verbose=False)
        start = find_resume(cfg, folder)
        task = kind(kind.resumed(cfg, start.path) if start.path else cfg)
        speed.set_attention(task.network, cfg.attention, wanted_gpu(cfg.trainer.accelerator), cfg.trainer.precision)
        task.module.images = cluster.contents(task.data)
        check_same_data(task.module, start)
        steps = total_steps(cfg, task.data.samples)
        agreement, sharded = cluster.RankConsistencyCheck(), cfg.trainer.strategy == "fsdp"
        if sharded:  # under FSDP no process holds the whole network, which these callbacks need
            task.callbacks = [c for c in task.callbacks if not getattr(c, "needs_whole_network", False)]
        trainer = make_trainer(
            cfg, steps, [agreement, *common_callbacks(cfg, folder, task), *task.callbacks, *callbacks]
        )
        speed.check_cuda_graphs(cfg.compile, trainer.accumulate_grad_batches, cfg.device_prefetch, sharded)
    return BuiltRun(cfg, task, trainer, start, steps, agreement)


def set_process(cfg: FitSettings) -> None:
    """Make the settings that hold for the whole process: threads, determinism."""
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    if cfg.deterministic:
        speed.make_deterministic(wanted_gpu(cfg.trainer.accelerator), find_task(cfg.task).nondeterministic_on_gpu)


def run(built: BuiltRun, signals: PreemptionSignals) -> dict[str, float]:
    """Check, resume, train and finish. Raises Preempted on a signal."""
    cfg, task, trainer, start, steps = built.cfg, built.task, built.trainer, built.start, built.steps
    with as_user_errors():
        introduction = "\n".join([run_summary(cfg, task, steps, trainer), *sources(task)])
        checks = preflight(cfg, task, trainer, steps)
        if cfg.trainer.strategy == "fsdp":
            fit_for_fsdp(cfg, task, trainer.world_size)
    if cfg.preflight == "only":
        if is_first_process():
            print("\n".join([introduction, *checks, "ready: the same command without preflight=only starts the run"]))
        return {}
    if is_first_process():
        print(introduction + (f"\n  resuming {cfg.name} after step {start.step}" if start.path else ""), flush=True)
    if start.path and finished_step(cfg.folder) == start.step:
        if is_first_process():
            restore_config(cfg)
            print("  already finished; for more steps choose another name=, or start over with resume=never")
        return {}
    with exclusive_lock(cfg.folder, is_first_process()):
        with as_user_errors():
            prepare(cfg, task, start, signals)
            open_folder(cfg, trainer, task.module, start)
            facts = cluster.facts(to_dict(cfg), task.module.images, start.step)
            facts["data.order"] = "position" if task.data.stream is None else "stream"  # auto may differ
            built.agreement.facts = facts
        try:
            train(task, trainer, start.path, cfg.timeout_minutes)
            metrics = finish(cfg, task, trainer, steps)
        except Preempted:
            close_loggers(trainer, "stopped")
            raise
        close_loggers(trainer, "finished")
        return metrics


def close_loggers(trainer: Trainer, how: str) -> None:
    """Finalize the loggers with the status `how`: "finished" or "stopped"."""
    for logger in trainer.loggers:
        logger.finalize(how)


def prepare(cfg: FitSettings, task: Task, start: ResumeState, signals: PreemptionSignals) -> None:
    """Set up logging interval, checkpoints, non-finite guard, time-outs and compilation of the task's module."""
    module, folder = task.module, cfg.folder / "checkpoints"
    module.log_every = cfg.log_every
    module.keeper = CheckpointManager(folder, cfg, signals)
    if start.path == folder / LAST:
        module.keeper.saved_at = start.step
    sharded = cfg.trainer.strategy == "fsdp"
    module.guard = NonFiniteGuard(cfg.folder / SKIPPED, cfg.max_nonfinite_steps, cfg.global_batch_size, sharded)
    module.exchange.patience = 0.9 * 60 * cfg.timeout_minutes  # before NCCL's time-out, which aborts without a message
    module.compile_mode = speed.compile_mode(cfg.compile, wanted_gpu(cfg.trainer.accelerator), sharded)
    torch._dynamo.config.optimize_ddp = bool(cfg.optimize_ddp)
    task.data.patience = 60 * cfg.timeout_minutes
    task.prepare()


def train(task: Task, trainer: Trainer, resume: Path | None, timeout_minutes: float) -> None:
    """Run the training loop, which does nothing if no steps are left. Raises Preempted, after saving, on a signal.

    A signal after the last step takes effect in `finish`.
    """
    keeper = task.module.keeper
    assert keeper is not None
    try:
        with keeper.ending(), cluster.distributed_errors(trainer, timeout_minutes):
            trainer.fit(task.module, task.data, ckpt_path=str(resume) if resume else None, weights_only=True)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        if resume is None or keeper.begun:
            raise
        raise UserError(f"the run cannot resume from {resume}: {type(error).__name__}: {first_line(error)}") from error
    except SystemExit:  # raised by Lightning on a second Ctrl-C
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise


def finish(cfg: FitSettings, task: Task, trainer: Trainer, steps: int) -> dict[str, float]:
    """Save and validate the last step, whatever `save_every` and `val_every` are; returns its metrics."""
    module, step, keeper = task.module, trainer.global_step, task.module.keeper
    assert keeper is not None
    if "val" in task.data.readers and step % min(cfg.val_every, steps) and keeper.validated_at != step:
        module.validation_due = True
    with keeper.ending():
        keeper.save(module)
        keeper.settle(trainer)
        signum = keeper.agreed_signal(trainer)
    keeper.end()
    if signum:
        raise Preempted(signum, step)
    if trainer.is_global_zero:
        early = f" (stopped early after step {step} of {steps})" if step < steps else ""
        print(f"saved {keeper.folder / LAST}{early}", flush=True)
    if module.validation_due:
        keeper.signals.looping = True  # so that on a signal all processes stop after the same batch
        with cluster.distributed_errors(trainer, cfg.timeout_minutes):
            trainer.validate(module, task.data, verbose=False)
        keeper.end()
    if trainer.is_global_zero:
        mark_finished(cfg.folder, step)
    return validation_metrics(trainer)


def validation_metrics(trainer: Trainer) -> dict[str, float]:
    """The metrics of the last validation."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}


def common_callbacks(cfg: FitSettings, folder: Path, task: Task) -> list[Callback]:
    """Callbacks of every task: progress, throughput, corrupt images; with held-out images the best checkpoint."""
    callbacks: list[Callback] = [
        ProgressBar(refresh_rate=10),
        Throughput(),
        CompileReport(asked=cfg.compile),
        CorruptImages(folder.parent / REPLACED, task.data.settings.max_corrupt_fraction),
    ]
    if cfg.profile:
        callbacks.append(speed.Profile(folder.parent / "profile"))
    if "val" in task.data.readers:
        metric, mode = task.best
        callbacks.append(ModelCheckpoint(folder, "best", monitor=metric, mode=mode, enable_version_counter=False))
    return callbacks


def validate(cfg: ValidateSettings) -> dict[str, float]:
    """Validate a run's last checkpoint on held-out images; prints and returns the metrics."""
    silence_warnings()
    given = {name: value for name, value in to_dict(cfg.test).items() if value is not None}
    overrides = {**({"data": {"val": cfg.data.val}} if cfg.data.val else {}), **({"test": given} if given else {})}
    with as_user_errors():
        run_cfg, task = load_run(cfg.run, overrides)
    if "val" not in task.data.readers:
        raise UserError("the run has no held-out images; give data.val=FOLDER")
    run_cfg.trainer = cfg.trainer
    with as_user_errors():
        trainer = make_trainer(run_cfg, 0, [ProgressBar(), CorruptImages(None, 1)])
    trainer.validate(task.module, task.data, verbose=False)
    metrics = validation_metrics(trainer)
    for name, value in sorted(metrics.items()) if trainer.is_global_zero else ():
        print(f"{name:32} {value:.4f}")
    return metrics
