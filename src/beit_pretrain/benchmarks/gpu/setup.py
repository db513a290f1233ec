"""What a stage is given: settings, sizes, folders and its time."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from beit_pretrain.benchmarks.gpu.plan import FULL, TINY, Sizes
from beit_pretrain.fileio import atomic_path


class Setup(NamedTuple):
    """Of one stage.

    `words`: the user's settings; `device`: "cuda" or "cpu"; `deadline`: of `time.monotonic()`.
    """

    words: tuple[str, ...]
    device: str
    tiny: bool
    out: Path
    scratch: Path
    deadline: float

    @classmethod
    def of(cls, job: dict[str, Any], deadline: float) -> Setup:
        device = "cpu" if job["device"] == "cpu" else "cuda"
        out, scratch = Path(job["out"]), Path(job["scratch"])
        return cls(tuple(job["words"]), device, job["tiny"], out, scratch, deadline)

    @property
    def sizes(self) -> Sizes:
        return TINY if self.tiny else FULL

    def left(self) -> float:
        """Seconds that the stage still has."""
        return self.deadline - time.monotonic()

    def encoder(self) -> Path:
        """A folder with an encoder of OpenAI's architecture and random weights; made once."""
        folder = self.scratch / ("encoder-tiny" if self.tiny else "encoder")
        if not (folder / "encoder.safetensors").is_file():
            from dall_e.encoder import Encoder
            from safetensors.torch import save_file

            folder.mkdir(exist_ok=True)
            small = {"n_hid": 16, "n_blk_per_group": 1, "vocab_size": 512} if self.tiny else {}
            with atomic_path(folder / "encoder.safetensors", unique=True) as temporary:  # other stages make it too
                save_file(Encoder(**small, requires_grad=False).state_dict(), temporary)
        return folder

    def settings(self, *words: str, experiment: str | None = None) -> list[str]:
        """Settings of `fit`: the stage's own, then the user's, which win; `experiment` in place of the user's."""
        given = [word for word in self.words if experiment is None or not word.startswith("+experiment=")]
        chosen = [f"+experiment={experiment}"] if experiment else []
        device = ["trainer.accelerator=cpu", "compile=true"] if self.device == "cpu" else ["trainer.accelerator=gpu"]
        return [*chosen, *self.sizes.words, *device, *words, *given]

    def config(self, *words: str, experiment: str | None = None, forced: tuple[str, ...] = ()) -> DictConfig:
        """The config of `bench step` with these settings; `forced` ones win over the user's. Raises UserError."""
        from beit_pretrain.benchmarks.inputs import check_settings
        from beit_pretrain.config import compose

        small = [f"tokenizer.path={self.encoder()}"] if self.tiny else []  # else random weights in memory
        given = ["action=step", *small, *self.settings(*words, experiment=experiment), *forced]
        cfg: DictConfig = compose("bench_step", given, spared=("data.train", "tokenizer.path"))
        check_settings(cfg)
        return cfg


def light_compiler() -> None:
    """Let torch.compile trace only, and run what it finds operator by operator.

    For tiny stages on a CPU, where C++ would be generated and compiled for a minute, which says nothing about a GPU.
    """
    import torch

    compiled: Any = torch.compile

    @cache
    def backend(mode: str | None) -> Any:  # another one for each mode: code is compiled anew, as it would be otherwise
        return lambda graph, inputs: graph.forward

    def light(function: Any, mode: str | None = None, **how: Any) -> Any:
        return compiled(function, backend=backend(mode), **how)

    torch.compile = light  # type: ignore[assignment]
