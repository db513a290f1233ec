"""Launchers of a sweep's runs: processes on this machine, or submitit jobs (on SLURM or local).

Each run is `fit` in a new process: a second run in the same process would inherit its process group, random state and
memory.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

from beit_pretrain.engine.dist_env import PROCESS_VARIABLES
from beit_pretrain.engine.preemption import PREEMPTED, Preempted, PreemptionSignals
from beit_pretrain.errors import UserError, first_line

PATIENCE = 120.0  # seconds for a run to save its last checkpoint after a signal


Handle: TypeAlias = "Process | Submitted"  # a run that was started
Start = Callable[[int, int], Handle]  # starts run `number` in `slot`


def launcher(words: list[str], folder: Path, jobs: int, work: list[tuple[list[str], Path]]) -> tuple[Start, int]:
    """The launcher that `hydra/launcher=` names: basic (the default), submitit_local or submitit_slurm.

    Returns the function that starts a run, and the number of slots.

    Args:
        work: command-line settings and log file of each run.
    """
    name = next((w.partition("=")[2] for w in words if w.startswith("hydra/launcher=")), "basic")
    settings = [w.removeprefix("hydra.launcher.") for w in words if w.startswith("hydra.launcher.")]
    if name == "basic":
        if settings:
            raise UserError(f"hydra.launcher.{settings[0]} needs hydra/launcher=submitit_slurm")
        gpus = shared_gpus(jobs)
        return lambda i, slot: Process(*work[i], gpus[slot] if gpus else None), jobs
    if name not in ("submitit_local", "submitit_slurm"):
        raise UserError(f"hydra/launcher={name} is not one of basic, submitit_local, submitit_slurm")
    executor = submitit_executor(name.removeprefix("submitit_"), settings, folder)
    tasks = [Job(command(words), log, str(Path.cwd())) for words, log in work]
    if name == "submitit_local":
        return lambda i, slot: Submitted(executor.submit(tasks[i])), jobs
    with executor.batch():  # one job array: SLURM limits how many jobs run at once
        sent = [executor.submit(task) for task in tasks]
    if sent:
        print(f"sent to SLURM as {sent[0].job_id.partition('_')[0]}; Ctrl-C cancels", flush=True)
    return lambda i, slot: Submitted(sent[i]), max(1, len(sent))


def run_all(names: list[str], start: Start, at_once: int) -> list[int]:
    """Run all, at most `at_once` at a time, and continue after failures; returns their exit codes.

    Signals are forwarded to the runs.
    """
    codes: dict[int, int] = {}
    running: dict[int, tuple[Handle, int, float]] = {}
    slots = list(range(at_once))
    todo = iter(range(len(names)))
    with stopping(running):
        while len(codes) < len(names):
            while slots and (number := next(todo, None)) is not None:
                slot = slots.pop(0)
                running[number] = start(number, slot), slot, time.monotonic()
                print(f"[{number + 1}/{len(names)}] {names[number]}: started", flush=True)
            for number, (handle, slot, begun) in list(running.items()):
                if (code := handle.poll()) is not None:
                    del running[number]
                    slots.append(slot)
                    codes[number] = code
                    how = f"failed with exit code {code}" if code else "finished"
                    seconds = f"after {time.monotonic() - begun:.0f} s"
                    print(f"[{number + 1}/{len(names)}] {names[number]}: {how} {seconds}", flush=True)
            time.sleep(0.1)
    return [codes[number] for number in range(len(names))]


@contextmanager
def stopping(running: dict[int, tuple[Handle, int, float]]) -> Iterator[None]:
    """End the runs when the sweep ends: forward Ctrl-C as SIGINT, other signals as SIGTERM, and let the runs save."""
    with PreemptionSignals():
        try:
            yield
        except BaseException as error:
            told = error.signum if isinstance(error, Preempted) else signal.SIGINT
            forwarded = signal.SIGINT if told == signal.SIGINT else signal.SIGTERM
            end([handle for handle, _, _ in running.values()], forwarded)
            if not isinstance(error, Preempted):
                raise
            if told == signal.SIGINT:
                raise KeyboardInterrupt from None
            print("stopped; rerun the same command to resume", file=sys.stderr)
            raise SystemExit(PREEMPTED) from None


def end(handles: list[Handle], number: int) -> None:
    """Send a signal to runs and wait for them; kill them after `PATIENCE` seconds or another Ctrl-C."""
    for handle in handles:
        handle.stop(number)
    deadline = time.monotonic() + PATIENCE
    with suppress(KeyboardInterrupt):
        while any(handle.poll() is None for handle in handles) and time.monotonic() < deadline:
            time.sleep(0.1)
    for handle in handles:
        if handle.poll() is None:
            handle.stop(signal.SIGKILL)


def command(words: list[str]) -> list[str]:
    return [sys.executable, "-m", "beit_pretrain", "fit", *words]


def member_environment(gpus: str | None = None) -> dict[str, str]:
    """The environment of a run: the sweep's, without the variables of distributed processes."""
    kept = {k: v for k, v in os.environ.items() if k not in PROCESS_VARIABLES and not k.startswith("TORCHELASTIC_")}
    return kept if gpus is None else {**kept, "CUDA_VISIBLE_DEVICES": gpus}


def begin(command: list[str], log: Path, cwd: str | None = None, gpus: str | None = None) -> subprocess.Popen:
    """Start a run's process in a new session, so that it and its children get each signal once, from the sweep."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=member_environment(gpus),
            cwd=cwd,
            start_new_session=True,
        )


def signal_group(process: subprocess.Popen, number: int) -> None:
    """Signal a run and its children."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


class Process:
    """A run as a process on this machine."""

    def __init__(self, words: list[str], log: Path, gpus: str | None):
        self.process = begin(command(words), log, gpus=gpus)

    def poll(self) -> int | None:
        """The exit code; None while the run goes on."""
        code = self.process.poll()
        return code if code is None or code >= 0 else 128 - code  # a signal, in the shell's convention

    def stop(self, number: int) -> None:
        """Send a signal."""
        if self.process.poll() is None:
            signal_group(self.process, number)


def shared_gpus(jobs: int) -> list[str] | None:
    """CUDA_VISIBLE_DEVICES of each of `jobs` concurrent runs; None = leave it unchanged (one job, or no GPUs)."""
    if jobs == 1:
        return None
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        visible = [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    else:
        import torch

        visible = [str(number) for number in range(torch.cuda.device_count())]
    if not visible:
        return None
    share = max(1, len(visible) // jobs)
    return [",".join(visible[i * share % len(visible) :][:share]) for i in range(jobs)]


def submitit_executor(cluster: str, settings: list[str], folder: Path) -> Any:
    """submitit's executor with the settings of Hydra's submitit launcher. Raises UserError for wrong settings."""
    try:
        import submitit
        from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf, LocalQueueConf, SlurmQueueConf
    except ImportError:
        raise UserError(f"hydra/launcher=submitit_{cluster} needs: pip install 'beit_pretrain[sweep]'") from None
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    defaults = OmegaConf.structured(LocalQueueConf if cluster == "local" else SlurmQueueConf)
    defaults.submitit_folder, defaults.name = str(folder.absolute() / ".submitit" / "%j"), "beit_pretrain"
    if cluster == "slurm":
        defaults.max_num_timeout = 100  # requeues: runs resume exactly, so there is no need for a low limit
    try:
        given: dict[str, Any] = OmegaConf.to_container(OmegaConf.merge(defaults, OmegaConf.from_dotlist(settings)))  # type: ignore[assignment]
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(f"hydra.launcher: {first_line(error)}") from error
    if cluster == "local" and (given["tasks_per_node"], given["nodes"]) != (1, 1):
        raise UserError("hydra/launcher=submitit_local: several processes on one machine are trainer.devices=N")
    place, timeouts = given.pop("submitit_folder"), given.pop("max_num_timeout", None)
    base = OmegaConf.structured(BaseQueueConf).keys()
    given.pop("_target_", None)
    try:
        executor = submitit.AutoExecutor(
            folder=place, cluster=cluster, **({} if timeouts is None else {f"{cluster}_max_num_timeout": timeouts})
        )
        executor.update_parameters(**{k if k in base else f"{cluster}_{k}": v for k, v in given.items()})
    except (RuntimeError, ValueError, TypeError, NameError) as error:  # no sbatch, or an invalid setting
        raise UserError(f"hydra/launcher=submitit_{cluster}: {first_line(error)}") from error
    return executor


class Job:
    """A run inside a submitit job: pickled, sent, called there, and called again after a requeue."""

    def __init__(self, command: list[str], log: Path, cwd: str):
        self.command, self.log, self.cwd = command, log, cwd
        self.process: subprocess.Popen | None = None

    def __call__(self) -> int:
        process = self.process = begin(self.command, Path(self.cwd) / self.log, self.cwd)
        told: list[int] = []

        def forward_signal(number: int, _: object) -> None:
            if not told:  # a cancelled job gets the signal twice: from the terminal and from submitit
                signal_group(process, signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
            told.append(number)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, forward_signal)
        code = process.wait()
        return code if code >= 0 else 128 - code

    def checkpoint(self) -> Any:
        """Called by submitit before a time limit or preemption: let the run save, then requeue the job."""
        from submitit.helpers import DelayedSubmission

        if self.process is not None:
            signal_group(self.process, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(PATIENCE)
        return DelayedSubmission(Job(self.command, self.log, self.cwd))


class Submitted:
    """A run as a submitit job."""

    def __init__(self, job: Any):
        self.job = job

    def poll(self) -> int | None:
        if not self.job.done():
            return None
        try:
            return next((code for code in self.job.results() if code), 0)
        except Exception:  # from submitit: cancelled, killed, out of time; the job's log has the details
            return 1

    def stop(self, number: int) -> None:
        self.job.cancel(check=False)
