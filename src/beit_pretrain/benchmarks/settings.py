"""Settings of the verb `bench`; its training steps take those of `fit` too."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from beit_pretrain.settings import (
    Count,
    Paths,
    PathStr,
    Positive,
    Rule,
    Seed,
    Settings,
    Side,
    Switch,
    Text,
    Whole,
    about,
)
from beit_pretrain.tokenizers.settings import TokenizerSettings

VARIANTS = (
    *("ours", "ours_tokenizer", "ours_cached", "reference", "reference_compiled", "reference_tokenizer"),
    *("transformers", "transformers_eager", "timm"),
)
Variant = Literal[VARIANTS]  # type: ignore[valid-type]
Stages = Annotated[Text | Annotated[list[Text], Field(min_length=1)], Rule("stages, such as base or base,large")]


class ImageBenchSettings(Settings):
    """Settings of `bench views` and `bench loader`."""

    defaults = "bench.yaml"

    action: Text = about("views: what our order of operations changes in pixels and tokens; loader: images/s per core")
    src: Paths = about("a folder, a tar, or a shard folder (with manifest.json) of images")
    tokenizer: TokenizerSettings | None = Field(
        None, description="views: openai or dvae, with tokenizer.path=...: also counts the tokens that change"
    )
    images: Count = about("at most so many of them")
    positions: Count | None = about("views: how many positions (crops, flips, jitters) to look at; null = one an image")
    seed: Seed = about("of crop, flip, jitter and mask")
    image_size: Side = about("side of the backbone's view")
    token_image_size: Side | None = about("side of the tokenizer's view; null = half of image_size")
    rounds: Count = about("loader: passes over the images with every variant")
    threads: Count | None = about("of torch; more than 1 speeds up the tokenizer of views")


class StepGroup(Settings):
    """How the training step is measured."""

    rounds: Count = about("of all variants in turn")
    warm_up: Whole = about("rounds before")
    steps: Count | None = about("timed together; null = on a GPU 5 (step), 100 (loop), on a CPU 1")
    clock: Literal["wall", "cpu"] = about("cpu: processor time of this process, for a CPU that others use too")
    variants: Annotated[list[Variant], Field(min_length=1), Rule(f"a list of some of {', '.join(VARIANTS)}")] = about(
        "what is measured"
    )
    memory_gb: Positive | None = about("memory: of the device, in 2^30 bytes; null = that of this GPU")
    src: PathStr | None = about("all: photos for bench loader; null = without it")
    out: PathStr = about("all: folder of the page")


class StepBenchSettings(Settings):
    """What `bench step`, `loop`, `attention`, `memory` and `all` have beside the settings of `fit`."""

    action: Text = about("step: images/s next to others'; loop: what logging and saving add; attention; memory; all")
    bench: StepGroup


class GpuGroup(StepGroup):
    """How everything is measured."""

    seconds: Positive = about("for everything; a stage that no longer fits is skipped")
    only: Stages | None = about(
        "stages, such as base or base,large; null = "
        "facts,data,warm,parity,compile,curves,base,large,attention,fit,triton,"
        "prefetch,wide,wider,graphs,autotune"
    )
    tiny: Switch = about("tiny networks and few images, to try whether every stage runs")
    scratch: PathStr | None = about("folder of compiled code, images and runs; null = kept in the temporary folder")


class GpuBenchSettings(Settings):
    """What `bench gpu` and `bench page` have beside the settings of `fit`."""

    action: Text = about("gpu, or page: the page once more")
    device: Literal["auto", "cpu"] = about("auto = the GPU | cpu, with bench.tiny=true")
    bench: GpuGroup
