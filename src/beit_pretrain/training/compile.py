"""What torch.compile made of a process's functions: graphs, graph breaks, recompilations, functions left uncompiled.

All of it is read from Dynamo's counters here and nowhere else; `fit`, `bench` and the tests share it.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from lightning import Callback, Trainer
from tqdm import tqdm

from beit_pretrain.errors import first_line

REPORT_AFTER = 3  # optimiser steps: by then every function of the step has been compiled


class CompileCounts(NamedTuple):
    """Counts since the process began, or between two moments (`since`)."""

    graphs: int = 0
    graph_breaks: int = 0
    recompilations: int = 0  # of functions that had been compiled before, for other inputs
    fallbacks: int = 0  # times that a function could not be compiled and ran eagerly instead
    seconds: float = 0.0  # spent on compiling

    def since(self, before: CompileCounts) -> CompileCounts:
        return CompileCounts(
            self.graphs - before.graphs,
            self.graph_breaks - before.graph_breaks,
            self.recompilations - before.recompilations,
            self.fallbacks - before.fallbacks,
            self.seconds - before.seconds,
        )

    @property
    def clean(self) -> bool:
        """Whether all that ran is one graph a function, compiled once."""
        return self.graphs > 0 and not (self.graph_breaks or self.recompilations or self.fallbacks)

    def __str__(self) -> str:
        return (
            f"{plural(self.graphs, 'graph')}, {plural(self.graph_breaks, 'graph break')}, "
            f"{plural(self.recompilations, 'recompilation')}, {self.seconds:.1f} s"
        )


def compile_counts() -> CompileCounts:
    """The counts since the process began.

    Calls that Dynamo skips from the start, under a TorchDispatchMode for instance, appear in none of them.
    """
    from torch._dynamo.utils import calculate_time_spent, counters, get_compilation_metrics  # a second to import

    frames = counters["frames"]
    return CompileCounts(
        graphs=counters["stats"]["unique_graphs"],
        graph_breaks=sum(counters["graph_break"].values()),
        recompilations=sum(metrics.recompile_reason is not None for metrics in get_compilation_metrics()),
        fallbacks=frames["total"] - frames["ok"],
        seconds=calculate_time_spent().get("total_wall_time", 0.0),
    )


def compile_reasons() -> list[str]:
    """One line for each reason why something was not one graph, compiled once: breaks, recompilations, failures."""
    from torch._dynamo.utils import counters, get_compilation_metrics

    reasons = [f"graph break: {first_line(Exception(text))}" for text in counters["graph_break"]]
    for metrics in get_compilation_metrics():
        if metrics.recompile_reason:
            reasons.append(f"recompiled {metrics.co_name}: {first_line(Exception(metrics.recompile_reason))}")
        if metrics.fail_reason:
            failure = f"{metrics.fail_type}: {first_line(Exception(metrics.fail_reason))}"
            reasons.append(f"not compiled, {metrics.co_name}: {failure}")
    return list(dict.fromkeys(reasons))


class CompileReport(Callback):
    """Prints the counts once, after the first steps of a run that compiles, and a warning where it fell back to eager.

    What was compiled again later is pointed out when training ends.
    """

    def __init__(self) -> None:
        self._first = 0  # the step at which this process began
        self._before = CompileCounts()
        self._reported: CompileCounts | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._first, self._reported = trainer.global_step, None
        if pl_module.compile_mode is not None:
            self._before = compile_counts()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs, batch, batch_idx: int) -> None:
        if self._reported is None and trainer.global_step >= self._first + REPORT_AFTER:
            self._report(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self._reported is None:
            self._report(trainer, pl_module)
        elif pl_module.compile_mode is not None and trainer.is_global_zero:
            later = compile_counts().since(self._reported)
            if later.recompilations or later.fallbacks:
                say(f"warning: later in the run torch.compile made {later} more")

    def _report(self, trainer: Trainer, pl_module: Any) -> None:
        self._reported = CompileCounts()
        if pl_module.compile_mode is None or not trainer.is_global_zero:
            return
        self._reported = compile_counts()
        found = self._reported.since(self._before)
        say(f"compiled: {found}")
        if found.fallbacks or not found.graphs:
            reasons = [reason for reason in compile_reasons() if reason.startswith("not compiled")]
            why = f" ({reasons[0]})" if reasons else ""
            say(f"warning: torch.compile fell back to eager execution, which is slower, for a part of the step{why}")


def say(line: str) -> None:
    """A line on stderr that does not break the progress bar."""
    tqdm.write(line, file=sys.stderr)


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
