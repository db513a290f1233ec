"""From a composed config to a finished run: trainer, folder, loggers; fit, validate.

The folder of a run holds `config.yaml`, `metrics.csv`, `pictures/`, `checkpoints/last.ckpt`, and, if there were bad
images, `replaced.jsonl`.
"""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from hydra.errors import InstantiationException
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from beit_pretrain.checkpoints import files as checkpoint
from beit_pretrain.compose import plain
from beit_pretrain.data.replacements import Replacements, cut_back
from beit_pretrain.errors import UserError, first_line
from beit_pretrain.runs import cluster
from beit_pretrain.runs.folder import FINISHED, REPLACED, differences, mark_finished
from beit_pretrain.runs.preflight import introduce, preflight
from beit_pretrain.runs.tasks import TASKS, Task
from beit_pretrain.training import speed
from beit_pretrain.training.callbacks import MaskedPictures, OnlineKNN, ProgressBar, Throughput
from beit_pretrain.training.guards import Guard
from beit_pretrain.training.keeping import LAST, PREEMPTED, Keeper, Stopped, newest_good
from beit_pretrain.training.metrics import CsvMetrics, is_first_process
from beit_pretrain.training.module import TrainedModule
from beit_pretrain.training.pretrain import Pretraining

BEST_BY = {"classifier": "val/accuracy", "segmenter": "val/miou"}  # kind of checkpoint -> the larger the better


def total_steps(cfg: DictConfig, samples: int) -> int:
    """Optimiser steps of the run, from `steps` or `epochs`."""
    if (cfg.steps is None) == (cfg.epochs is None):
        raise UserError("set the length of the run by either steps=N or epochs=N")
    steps = cfg.steps if cfg.steps is not None else int(cfg.epochs * samples / cfg.global_batch)
    if steps < 1:
        raise UserError(f"the run has {steps} steps: {samples} images make no global batch of {cfg.global_batch}")
    return int(steps)


def micro_batches(global_batch: int, batch_size: int, world: int) -> int:
    """Micro-batches per process and optimiser step. Raises UserError if the numbers do not divide."""
    share = global_batch // world
    if global_batch % world or share == 0 or share % min(batch_size, share):
        raise UserError(
            f"global_batch={global_batch} is not a multiple of batch_size={batch_size} times {world} processes"
        )
    return share // min(batch_size, share)


def make_trainer(cfg: DictConfig, steps: int, callbacks: list[Callback]) -> Trainer:
    """Lightning's Trainer: it runs the loop; gradients, batches and metrics are the modules' own."""
    settings = cluster.arranged(plain(cfg.trainer), cfg.get("timeout_minutes", 30))
    plugins = [checkpoint.AtomicCheckpointIO(), *settings.pop("plugins")]
    if settings["precision"] == "auto":
        gpu = wanted_gpu(settings["accelerator"]) and torch.cuda.is_bf16_supported()
        settings["precision"] = "bf16-mixed" if gpu else "32-true"
    # A decoder's batch norms see few images a GPU: statistics over all of them, as in the release. CPUs have no such.
    settings["sync_batchnorm"] = cfg.task == "segment" and wanted_gpu(settings["accelerator"])
    trainer = Trainer(
        **settings,
        max_steps=steps,
        logger=False,
        callbacks=callbacks,
        default_root_dir=cfg.run_dir,
        use_distributed_sampler=False,  # batches are dealt to processes by their positions
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        log_every_n_steps=1,  # metrics have a rhythm of their own; this only keeps a warning away
        plugins=plugins,
    )
    if steps:  # validating takes none: the global batch need not divide among its processes
        accumulate = micro_batches(cfg.global_batch, cfg.batch_size, trainer.world_size)
        trainer.accumulate_grad_batches = accumulate
        trainer.val_check_interval = min(cfg.val_every, steps) * accumulate
    return trainer


def wanted_gpu(accelerator: str) -> bool:
    """Whether a run with this accelerator is on a GPU of CUDA."""
    return accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def quieten() -> None:
    """Keep advertisements and warnings about what is so on purpose away from the lines that matter."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        "LeafSpec",
        "does not have many workers",
        "Checkpoint directory .* exists",
        "dataloader is not resumable",
        "Total length of",
    ):
        warnings.filterwarnings("ignore", f".*{message}")


@contextmanager
def building() -> Iterator[None]:
    """Errors while a run is built come from its settings: one line for the person who wrote them."""
    try:
        yield
    except InstantiationException as error:
        raise UserError(first_line(error.__cause__ or error)) from error
    except (ValueError, TypeError, LookupError, ArithmeticError, AssertionError, RuntimeError) as error:
        raise UserError(first_line(error)) from error
    except (MisconfigurationException, OmegaConfBaseException) as error:
        raise UserError(first_line(error)) from error


def fit(cfg: DictConfig) -> dict[str, float]:
    """Train what the config describes; returns the last validation metrics."""
    folder = Path(cfg.run_dir) / "checkpoints"
    quieten()
    with building():
        if cfg.task not in TASKS:
            raise UserError(f"task={cfg.task} is not one of {', '.join(TASKS)}")
        if cfg.threads is not None:
            torch.set_num_threads(cfg.threads)
        seed_everything(cfg.seed, workers=True, verbose=False)
        resume = to_resume(cfg, folder)
        task = TASKS[cfg.task](from_checkpoint(cfg, resume) if resume else cfg)
        steps = total_steps(cfg, task.data.samples)
        agreement, sharded = cluster.Agreement(), cfg.trainer.strategy == "fsdp"
        if sharded:  # these look at the network in one process, where it is no longer whole
            task.callbacks = [c for c in task.callbacks if not isinstance(c, MaskedPictures | OnlineKNN)]
        trainer = make_trainer(cfg, steps, [agreement, *common_callbacks(cfg, folder, task), *task.callbacks])
        introduction = introduce(cfg, task, steps, trainer)
        checks = preflight(cfg, task, trainer)
        if sharded:
            cluster.fit_for_fsdp(cfg, task.data, trainer.world_size)
        if cfg.preflight == "only":
            print("\n".join([introduction, *checks, "ready: the same command without preflight=only starts the run"]))
            return {}
        prepare(cfg, task, folder)
        done = open_loggers(cfg, trainer, task.module, resume)
        agreement.facts = cluster.facts(plain(cfg), task.data, done)
    if is_first_process():
        print(introduction + (f"\n  continuing {cfg.name} after step {done}" if resume else ""), flush=True)
    if resume and done >= steps:
        if is_first_process():
            print("  already finished; more steps would be another run: choose another name=, or resume=never")
            mark_finished(Path(cfg.run_dir), done)
        return {}
    train(task, trainer, resume, cfg.timeout_minutes)
    return finish(cfg, task, trainer, steps)


def prepare(cfg: DictConfig, task: Task, folder: Path) -> None:
    """What watches over the run: its rhythm, its checkpoints, its guard."""
    module = task.module
    module.log_every = cfg.log_every
    module.keeper = Keeper(folder, cfg.save_every, cfg.save_minutes, cfg.keep_every)
    on_gpu = wanted_gpu(cfg.trainer.accelerator)
    module.compile_mode = speed.compile_mode(cfg.compile, on_gpu, cfg.trainer.strategy == "fsdp")
    if cfg.ahead and isinstance(module, Pretraining):
        task.data.wrapped = lambda loader: speed.Ahead(loader, module.prepare, module.device)
    if cfg.trainer.strategy != "fsdp":  # its optimiser's tensors are in parts, which the guard's flag is not
        module.guard = Guard(Path(cfg.run_dir) / "skipped.jsonl", cfg.max_skipped, cfg.global_batch)


def train(task: Task, trainer: Trainer, resume: Path | None, timeout_minutes: float) -> None:
    """Run the loop. Raises KeyboardInterrupt after Ctrl-C and SystemExit(75) after SIGTERM, both with all saved."""
    keeper = task.module.keeper
    assert keeper is not None
    try:
        with cluster.connected(trainer, timeout_minutes):
            trainer.fit(task.module, task.data, ckpt_path=str(resume) if resume else None, weights_only=True)
    except Stopped as stopped:
        if trainer.is_global_zero:
            print(f"{stopped}, saved {keeper.folder / LAST}; the same command goes on from there", flush=True)
        if stopped.signum == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise SystemExit(PREEMPTED) from None
    except SystemExit:  # Lightning's answer to a Ctrl-C that came twice
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise
    finally:
        keeper.end()


def finish(cfg: DictConfig, task: Task, trainer: Trainer, steps: int) -> dict[str, float]:
    """Save the last checkpoint and measure it, whatever `save_every` and `val_every` are."""
    assert task.module.keeper is not None
    task.module.keeper.save(task.module)
    if trainer.is_global_zero:
        early = f" (stopped early after step {trainer.global_step} of {steps})" if trainer.global_step < steps else ""
        print(f"saved {task.module.keeper.folder / LAST}{early}", flush=True)
    if "val" in task.data.readers and trainer.global_step % min(cfg.val_every, steps):
        with cluster.connected(trainer, cfg.timeout_minutes):
            trainer.validate(task.module, task.data, verbose=False)
    if trainer.is_global_zero:
        mark_finished(Path(cfg.run_dir), trainer.global_step)
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}


def common_callbacks(cfg: DictConfig, folder: Path, task: Task) -> list[Callback]:
    """Progress, throughput and checkpoints: the last one, and the best one where a metric says which."""
    callbacks: list[Callback] = [
        ProgressBar(refresh_rate=10),
        Throughput(),
        Replacements(folder.parent / REPLACED, cfg.data.get("max_bad", 0.001)),
    ]
    if cfg.get("profile"):
        callbacks.append(speed.Profile(folder.parent / "profile"))
    watched = BEST_BY.get(task.module.kind)
    if watched and "val" in task.data.readers:
        callbacks.append(ModelCheckpoint(folder, "best", monitor=watched, mode="max", enable_version_counter=False))
    return callbacks


def open_loggers(cfg: DictConfig, trainer: Trainer, module: TrainedModule, resume: Path | None) -> int:
    """Make the run's folder, write its config, attach the loggers. Returns the step from which the run goes on."""
    run_dir = Path(cfg.run_dir)
    content = checkpoint.read(resume) if resume else {}
    if is_first_process():  # the trainer does not know its rank before it has launched its processes
        if resume is None:  # nothing of an earlier run must remain; nothing else is touched, whatever run_dir is
            for pattern in (
                "checkpoints/last.ckpt",
                "checkpoints/best.ckpt",
                "pictures/step-*.png",
                "metrics.csv",
                REPLACED,
                FINISHED,
            ):
                for file in run_dir.glob(pattern):
                    file.unlink()
        run_dir.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(cfg, run_dir / ".config.yaml.partial", resolve=True)
        (run_dir / ".config.yaml.partial").replace(run_dir / "config.yaml")  # other processes may read it just now
    done = int(content.get("global_step", 0))
    if resume:
        same_backbone(module, content.get("beit_pretrain", {}), resume)
    metrics = CsvMetrics(run_dir / "metrics.csv")
    if resume:
        metrics.cut_back(done)
        if is_first_process():
            cut_back(run_dir / REPLACED, done)
    trainer.loggers = [metrics]
    if cfg.logger.kind == "wandb":
        from beit_pretrain.training.weights_and_biases import new_id, wandb_logger

        module.about["wandb_id"] = content.get("beit_pretrain", {}).get("wandb_id") or new_id()
        trainer.loggers = [metrics, wandb_logger(cfg, module.about["wandb_id"])]
    return done


def to_resume(cfg: DictConfig, folder: Path) -> Path | None:
    """The checkpoint that the run goes on from: the newest good one of its folder; None = a new run.

    Raises UserError if the folder has a run of other settings, or checkpoints that cannot be read.
    """
    config = Path(cfg.run_dir) / "config.yaml"
    if cfg.resume == "never" or not any(folder.glob("*.ckpt")):
        return None
    if config.is_file():
        different = differences(plain(OmegaConf.load(config)), plain(cfg))
        if different:
            raise UserError(
                f"{cfg.run_dir} holds a run with other settings ({'; '.join(different[:3])}"
                f"{'; ...' if len(different) > 3 else ''}); choose another name=, or resume=never to start over"
            )
    newest, problems = newest_good(folder)
    for problem in problems if is_first_process() else []:
        print(f"warning: {problem}; going on from {newest}", file=sys.stderr, flush=True)
    return newest


def load_run(run: str | Path, overrides: DictConfig | None = None) -> tuple[DictConfig, Task]:
    """Config and task of a finished (or running) run, with the weights of its last checkpoint."""
    run = Path(run)
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is not the folder of a run (it has no config.yaml)")
    cfg = cast(DictConfig, OmegaConf.merge(OmegaConf.load(run / "config.yaml"), overrides or {}))
    last = run / "checkpoints" / LAST
    task = TASKS[cfg.task](from_checkpoint(cfg, last))
    _, state, about = checkpoint.read_own(last, task.module.kind)
    same_backbone(task.module, about, last)
    checkpoint.load_exactly(task.module.model, state, last)
    return cfg, task


def same_backbone(module: TrainedModule, about: dict, last: Path) -> None:
    """Raise UserError if probes were trained on another backbone than they are put on now."""
    if about.get("backbone") != module.about.get("backbone"):
        raise UserError(f"{last} was trained on another backbone than {module.about.get('init_from')} holds now")


def from_checkpoint(cfg: DictConfig, last: Path) -> DictConfig:
    """The config with the network of the run's own checkpoint: what it once started from need not exist any more."""
    if cfg.task == "probe":  # it holds the probes alone; their backbone stays where it was
        return cfg
    own = {"init_from": str(last), "from_scratch": False, "new_head": False}
    return cast(DictConfig, OmegaConf.merge(cfg, {name: value for name, value in own.items() if name in cfg}))


def validate(cfg: DictConfig) -> dict[str, float]:
    """Metrics of a run's last checkpoint on held-out images; prints and returns them."""
    quieten()
    given = {name: value for name, value in cfg.test.items() if value is not None}
    overrides = OmegaConf.create(
        {**({"data": {"val": cfg.data.val}} if cfg.data.val else {}), **({"test": given} if given else {})}
    )
    with building():
        run_cfg, task = load_run(cfg.run, overrides)
    if given and run_cfg.task != "segment":
        raise UserError(f"test.{next(iter(given))} is of segmentation; {cfg.run} is a run of task {run_cfg.task}")
    if "val" not in task.data.readers:
        raise UserError("the run has no held-out images; give data.val=FOLDER")
    run_cfg.trainer = cfg.trainer
    with building():
        trainer = make_trainer(run_cfg, 0, [ProgressBar(), Replacements(None, 1)])
    trainer.validate(task.module, task.data, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    for name, value in sorted(metrics.items()) if trainer.is_global_zero else ():
        print(f"{name:32} {value:.4f}")
    return metrics
