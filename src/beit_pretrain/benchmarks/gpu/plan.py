"""The stages of `bench gpu`, in their order, and what each of them is given: sizes, settings, folders and time.

Estimates are for one H100 with 16 cores: all of it takes about 540 s. The order is by value: what comes first is left
when time runs out. Stages in the background prepare what later ones need, and are waited for before anything is timed.
Imports nothing heavy.
"""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from beit_pretrain.benchmarks.report import Report
from beit_pretrain.fileio import atomic_path

if TYPE_CHECKING:
    from beit_pretrain.benchmarks.inputs import Bench


class Stage(NamedTuple):
    """One process of `bench gpu`.

    `function`: module:function, taking a `Setup` and a `Report`. `least`: seconds without which it is not started;
    `limit`: seconds after which it is ended.
    """

    name: str
    about: str
    function: str
    least: float
    limit: float
    background: bool = False
    timed: bool = True  # waits for those in the background


HERE = "beit_pretrain.benchmarks.gpu"
STAGES = (
    Stage("facts", "versions, bandwidth, peak of matrix products", f"{HERE}.machine:facts", 5, 90),
    Stage("data", "synthetic JPEGs into shards", f"{HERE}.run:data", 10, 150, background=True),
    Stage("warm", "compiled code of the reference and of large", f"{HERE}.step:warm", 30, 200, background=True),
    Stage("parity", "attention and tokens against float64 and fp32", f"{HERE}.parity:parity", 10, 120, timed=False),
    Stage("compile", "compiled against eager: loss, gradients", f"{HERE}.parity:compiled", 25, 150, timed=False),
    Stage("curves", "loss of the fast and the plain path", f"{HERE}.curves:curves", 25, 120, timed=False),
    Stage("base", "a step of base next to others", f"{HERE}.step:base", 40, 150),
    Stage("large", "a step of large", f"{HERE}.step:large", 30, 80),
    Stage("attention", "attention kernels", f"{HERE}.step:attention", 15, 60),
    Stage("fit", "a real run: loader, cached tokens, profile", f"{HERE}.run:fit", 50, 150),
    Stage("triton", "a step of base by either attention", f"{HERE}.step:triton", 45, 120),
    Stage("prefetch", "fit with the tokenizer on line, prefetched or not", f"{HERE}.run:prefetch", 45, 110),
    Stage("wide", "a step of base with more images", f"{HERE}.step:wide", 35, 100),
    Stage("wider", "a step of base with still more images", f"{HERE}.step:wider", 35, 100),
    Stage("graphs", "few images: CUDA graphs or not", f"{HERE}.step:graphs", 45, 120),
    Stage("autotune", "compile=max-autotune-no-cudagraphs", f"{HERE}.step:autotune", 60, 300),
)
SIZES = {  # how much is measured: in full, and with bench.tiny=true
    "base": (128, 4),  # images of a step of base, wherever it is: so its compiled code is shared
    "large": (128, 3),
    "wide": (256, 6),
    "wider": (512, 8),
    "graphs": (32, 2),
    "parity": (32, 2),  # images for attention and tokens
    "precise": (32, 2),  # images of a step in fp32
    "shallow": (4, 2),  # blocks of the network that is compared in fp32
    "curve": (200, 8),  # steps of the loss curves
    "photos": (4000, 40),
    "pixels": (500, 48),  # sides of a photo
    "run": (300, 20),  # steps of `fit`
    "switched": (80, 20),  # steps of `fit` with the prefetcher on and off
    "side": (8192, 128),  # of the matrices whose product is timed
    "copied": (2**30, 2**20),  # bytes
    "rounds": (12, 3),  # at the most
}
TINY_NETWORK = (
    "model.size=null +model.embed_dim=32 +model.depth=2 +model.num_heads=2 +model.init_values=0.1 "
    "image_size=32 patch_size=8 mask.max_patches=6 mask.min_block=1 threads=1"
)


class Setup(NamedTuple):
    """What a stage is given.

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
        return cls(tuple(job["words"]), device, job["tiny"], Path(job["out"]), Path(job["scratch"]), deadline)

    @property
    def sizes(self) -> Any:
        """By the names in `SIZES`."""
        return SimpleNamespace(**{name: pair[self.tiny] for name, pair in SIZES.items()})

    @property
    def network(self) -> list[str]:
        """Settings of a tiny network, if that is asked for."""
        return TINY_NETWORK.split() if self.tiny else []

    def left(self) -> float:
        """Seconds that the stage still has."""
        return self.deadline - time.monotonic()

    def encoder(self) -> Path:
        """A folder with an encoder of OpenAI's architecture and random weights; made once."""
        folder = self.scratch / ("encoder-tiny" if self.tiny else "encoder")
        file = folder / "encoder.safetensors"
        if not file.is_file():
            from dall_e.encoder import Encoder
            from safetensors.torch import save_file

            folder.mkdir(exist_ok=True)
            small = {"n_hid": 16, "n_blk_per_group": 1, "vocab_size": 512} if self.tiny else {}
            with atomic_path(file, unique=True) as temporary:  # stages beside this one make it too
                save_file(Encoder(**small, requires_grad=False).state_dict(), temporary)
        return folder

    def settings(self, *words: str, experiment: str | None = None) -> list[str]:
        """Settings of `fit`: the stage's own, then the user's, which win; `experiment` in place of the user's."""
        given = [word for word in self.words if experiment is None or not word.startswith("+experiment=")]
        chosen = [f"+experiment={experiment}"] if experiment else []
        device = ["trainer.accelerator=cpu", "compile=true"] if self.device == "cpu" else ["trainer.accelerator=gpu"]
        return [*chosen, *self.network, *device, *words, *given]

    def config(self, *words: str, experiment: str | None = None, forced: tuple[str, ...] = ()) -> Any:
        """The config of `bench step` with these settings; `forced` ones win over the user's. Raises UserError."""
        from beit_pretrain.config import compose

        small = [f"tokenizer.path={self.encoder()}"] if self.tiny else []  # else random weights in memory
        given = ["action=step", *small, *self.settings(*words, experiment=experiment), *forced]
        cfg: Any = compose("bench_step", given, spared=("data.train", "tokenizer.path"))
        return cfg

    def bench(self, report: Report, size: str, *words: str, **how: Any) -> Bench:
        """What a stage measures, on batches of a size of `SIZES`; the other arguments are those of `config`."""
        from beit_pretrain.benchmarks.inputs import make_bench

        bench = make_bench(self.config(f"batch_size={getattr(self.sizes, size)}", *words, **how))
        report(about=bench.about)
        return bench
