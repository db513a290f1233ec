"""What torch.compile made of a process's functions: graphs, graph breaks, recompilations, functions left uncompiled.

All of it is read from Dynamo's counters here and nowhere else; `fit`, `bench` and the tests share it.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, NamedTuple

from lightning import Callback, Trainer
from tqdm import tqdm

REMEMBERED = 10_000  # compilations
REPORT_AFTER = 3  # optimiser steps: by then every function of the step has been compiled


class CompileCounts(NamedTuple):
    """Counts since the process began, or between two moments (`since`)."""

    graphs: int = 0
    graph_breaks: int = 0
    recompilations: int = 0  # of functions that had been compiled before, for other inputs
    fallbacks: int = 0  # times that a function could not be compiled and ran eagerly instead
    seconds: float = 0.0  # spent on compiling
    pieces: int = 0  # into which graphs were cut for DDP, beyond one each

    def since(self, before: CompileCounts) -> CompileCounts:
        return CompileCounts(
            self.graphs - before.graphs,
            self.graph_breaks - before.graph_breaks,
            self.recompilations - before.recompilations,
            self.fallbacks - before.fallbacks,
            self.seconds - before.seconds,
            self.pieces - before.pieces,
        )

    @property
    def clean(self) -> bool:
        """Whether all that ran is one graph a function, compiled once."""
        return self.graphs > 0 and not (self.graph_breaks or self.recompilations or self.fallbacks)

    def __str__(self) -> str:
        cut = f" (for DDP in {self.graphs + self.pieces} pieces)" if self.pieces else ""
        return (
            f"{plural(self.graphs, 'graph')}{cut}, {plural(self.graph_breaks, 'graph break')}, "
            f"{plural(self.recompilations, 'recompilation')}, {self.seconds:.1f} s"
        )


def compile_counts() -> CompileCounts:
    """The counts since the process began.

    Calls that Dynamo skips from the start, under a TorchDispatchMode for instance, appear in none of them.
    """
    from torch._dynamo.utils import calculate_time_spent, counters, get_compilation_metrics  # a second to import

    remember_all()
    frames, graphs = counters["frames"], counters["stats"]["unique_graphs"]
    return CompileCounts(
        graphs=graphs,
        graph_breaks=sum(counters["graph_break"].values()),
        recompilations=sum(metrics.recompile_reason is not None for metrics in get_compilation_metrics()),
        pieces=max(0, counters["aot_autograd"]["total"] - graphs),  # DDPOptimizer compiles each by itself
        fallbacks=frames["total"] - frames["ok"],
        seconds=calculate_time_spent().get("total_wall_time", 0.0),
    )


@cache
def remember_all() -> None:
    """Let Dynamo keep what it says of a compilation: its own limit is the last 64."""
    from torch._dynamo.utils import set_compilation_metrics_limit

    set_compilation_metrics_limit(REMEMBERED)


def compile_reasons(counts: CompileCounts) -> list[str]:
    """One line for each reason of the latest failures, recompilations and graph breaks: of as many as were counted."""
    from torch._dynamo.utils import counters, get_compilation_metrics

    newest = get_compilation_metrics()[::-1]
    failed = [
        f"not compiled, {m.co_name}: {m.fail_type}: {first_lines(m.fail_reason)}" for m in newest if m.fail_reason
    ]
    again = [f"recompiled {m.co_name}: {first_lines(m.recompile_reason)}" for m in newest if m.recompile_reason]
    breaks = [f"graph break: {first_lines(text)}" for text in reversed(counters["graph_break"])]
    reasons = failed[: counts.fallbacks] + again[: counts.recompilations] + breaks[: counts.graph_breaks]
    return list(dict.fromkeys(reasons))


def first_lines(text: str | None, count: int = 2) -> str:
    """The first lines of a message of Dynamo's as one line."""
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    return " ".join(lines[:count])[:300]


class CompileReport(Callback):
    """Prints the counts once, after the first steps of a run that compiles, and a warning where it fell back to eager.

    What was compiled again later is pointed out when training ends.

    Args:
        asked: `compile=` of the run.
    """

    def __init__(self, asked: bool | str = "auto") -> None:
        self._asked = asked
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
        if not pl_module.compiles:
            if self._asked != "auto":
                say(f"note: compile={str(self._asked).lower()} has no effect: runs of this task are not compiled")
            return
        self._reported = compile_counts()
        found = self._reported.since(self._before)
        say(f"compiled: {found}")
        if found.fallbacks or not found.graphs:
            why = "".join(f" ({reason})" for reason in compile_reasons(found)[:1])
            say(f"warning: torch.compile fell back to eager execution, which is slower, for a part of the step{why}")


def say(line: str) -> None:
    """A line on stderr that does not break the progress bar."""
    tqdm.write(line, file=sys.stderr)


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
