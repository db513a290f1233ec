"""The stages of `bench gpu`, in their order, and the sizes of what they measure. Imports nothing heavy.

Estimates are for one H100 with 16 cores: all of it takes about 540 s. The order is by value: what comes first is left
when time runs out. Stages in the background prepare what later ones need, and are waited for before anything is timed.
"""

from __future__ import annotations

from typing import NamedTuple


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


EXPERIMENT = "base_22k"  # unless +experiment= says another
HERE = "beit_pretrain.benchmarks.gpu"
STAGES = (
    Stage("facts", "versions, bandwidth, peak of matrix products", f"{HERE}.device:facts", 5, 90),
    Stage("data", "synthetic JPEGs into shards", f"{HERE}.run:data", 10, 150, background=True),
    Stage("warm", "compiled code of the reference and of large", f"{HERE}.step:warm", 30, 200, background=True),
    Stage("parity", "attention and tokens against float64 and fp32", f"{HERE}.parity:parity", 10, 120, timed=False),
    Stage("compile", "compiled against eager: loss, gradients", f"{HERE}.parity:compiled", 25, 150, timed=False),
    Stage("curves", "loss over 200 steps, fast and plain", f"{HERE}.curves:curves", 25, 120, timed=False),
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


class Sizes(NamedTuple):
    """How much is measured."""

    words: tuple[str, ...]  # settings of every stage
    base: int  # images of a step of base, wherever it is: so its compiled code is shared
    large: int
    wide: int
    wider: int
    graphs: int
    parity: int  # images for attention and tokens
    precise: int  # images of a step in fp32
    shallow: int  # blocks of the network that is compared in fp32
    curve: int  # steps of the loss curves
    photos: int
    pixels: int  # sides of a photo
    run: int  # steps of `fit`
    switched: int  # steps of `fit` with the prefetcher on and off
    side: int  # of the matrices whose product is timed
    copied: int  # bytes
    rounds: int  # at the most


FULL = Sizes(
    words=(),
    base=128,
    large=128,
    wide=256,
    wider=512,
    graphs=32,
    parity=32,
    precise=32,
    shallow=4,
    curve=200,
    photos=4000,
    pixels=500,
    run=300,
    switched=80,
    side=8192,
    copied=2**30,
    rounds=12,
)
NETWORK = (  # of a tiny one
    "model.size=null +model.embed_dim=32 +model.depth=2 +model.num_heads=2 +model.init_values=0.1 "
    "image_size=32 patch_size=8 mask.max_patches=6 mask.min_block=1 threads=1"
)
TINY = Sizes(
    words=tuple(NETWORK.split()),
    base=4,
    large=3,
    wide=6,
    wider=8,
    graphs=2,
    parity=2,
    precise=2,
    shallow=2,
    curve=8,
    photos=40,
    pixels=48,
    run=20,
    switched=20,
    side=128,
    copied=2**20,
    rounds=3,
)
