"""Statistics of torch.compile: graphs, graph breaks, recompilations and fallbacks to eager execution.

The only place that reads Dynamo's counters; `fit`, `bench` and the tests use it.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from lightning import Callback, Trainer
from tqdm import tqdm

REMEMBERED = 10_000  # compilations that Dynamo keeps metrics of, instead of 64
REPORT_AFTER = 3  # optimiser steps: by then every function of the step has been compiled


class CompileCounts(NamedTuple):
    """Counts since the process started, or since an earlier count (`since`)."""

    graphs: int = 0
    graph_breaks: int = 0
    recompilations: int = 0  # of functions already compiled for other inputs
    fallbacks: int = 0  # compilations that failed, so that the function ran eagerly
    seconds: float = 0.0  # compile time
    pieces: int = 0  # additional subgraphs from DDPOptimizer's splits

    def since(self, before: CompileCounts) -> CompileCounts:
        return CompileCounts._make(now - earlier for now, earlier in zip(self, before, strict=True))

    @property
    def clean(self) -> bool:
        """Whether every function is one graph, compiled once."""
        return self.graphs > 0 and not (self.graph_breaks or self.recompilations or self.fallbacks)

    def __str__(self) -> str:
        cut = f" (for DDP in {self.graphs + self.pieces} pieces)" if self.pieces else ""
        return (
            f"{plural(self.graphs, 'graph')}{cut}, {plural(self.graph_breaks, 'graph break')}, "
            f"{plural(self.recompilations, 'recompilation')}, {self.seconds:.1f} s"
        )


def compile_counts() -> CompileCounts:
    """The counts since the process started.

    Calls that Dynamo skips entirely, for instance under a TorchDispatchMode, are not counted.
    """
    from torch._dynamo import utils  # takes 1 s to import

    utils.set_compilation_metrics_limit(REMEMBERED)
    counters = utils.counters
    frames, graphs = counters["frames"], counters["stats"]["unique_graphs"]
    return CompileCounts(
        graphs=graphs,
        graph_breaks=sum(counters["graph_break"].values()),
        recompilations=sum(metrics.recompile_reason is not None for metrics in utils.get_compilation_metrics()),
        pieces=max(0, counters["aot_autograd"]["total"] - graphs),  # DDPOptimizer compiles each subgraph separately
        fallbacks=frames["total"] - frames["ok"],
        seconds=utils.calculate_time_spent().get("total_wall_time", 0.0),
    )


def compile_reasons(counts: CompileCounts) -> list[str]:
    """One line per reason of the latest failures, recompilations and graph breaks, as many as `counts` has."""
    from torch._dynamo.utils import counters, get_compilation_metrics

    newest = get_compilation_metrics()[::-1]
    failed = [
        f"not compiled, {m.co_name}: {m.fail_type}: {first_lines(m.fail_reason)}" for m in newest if m.fail_reason
    ]
    again = [f"recompiled {m.co_name}: {first_lines(m.recompile_reason)}" for m in newest if m.recompile_reason]
    breaks = [f"graph break: {first_lines(text)}" for text in reversed(counters["graph_break"])]
    reasons = failed[: counts.fallbacks] + again[: counts.recompilations] + breaks[: counts.graph_breaks]
    return list(dict.fromkeys(reasons))


def first_lines(text: str | None) -> str:
    """The first two lines of a Dynamo message, joined into one line."""
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    return " ".join(lines[:2])[:300]


class CompileReport(Callback):
    """Prints the counts once, after the first steps, with a warning if a function fell back to eager execution.

    Later recompilations are reported at the end of training. `asked`: the run's setting `compile`.
    """

    def __init__(self, asked: bool | str = "auto") -> None:
        self._asked = asked
        self._first = 0  # step at which this process started
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
    """Print a line to stderr without breaking the progress bar."""
    tqdm.write(line, file=sys.stderr)


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
