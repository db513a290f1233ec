"""Settings that every training has (tasks add theirs), and those of `validate`, `visualize` and sweeps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, Strict, model_validator

from beit_pretrain.errors import AllRanksError
from beit_pretrain.settings import (
    BelowOne,
    Count,
    Name,
    NonNegative,
    Paths,
    PathStr,
    Positive,
    Rule,
    Seconds,
    Seed,
    Settings,
    Share,
    ShareAboveZero,
    Switch,
    Text,
    Whole,
    about,
)

Minutes = Annotated[float, Strict(), Field(gt=0, le=100_000)]
ImageScale = Annotated[float, Strict(), Field(gt=0, le=16)]
PatchPlace = Annotated[list[Whole], Field(min_length=2, max_length=2)]
DeviceNumbers = Annotated[list[Whole], Field(min_length=1)]
Devices = Annotated[
    Literal["auto", -1] | Count | DeviceNumbers, Rule("auto, a number of devices, or a list of their numbers")
]
Compile = Literal["auto", True, False, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


class OptimSettings(Settings):
    """AdamW and its schedule."""

    defaults = "fit.yaml:optim"

    lr: Positive = about("peak learning rate, used as it is: never scaled by the batch size")
    min_lr: NonNegative = about("learning rate of the last step")
    warmup_epochs: NonNegative | None = about("length of the warm-up, in epochs ...")
    warmup_steps: Whole = about("... or in optimiser steps")
    weight_decay: NonNegative = about("not applied to biases, norms, positions and the [CLS] token")
    betas: Annotated[list[BelowOne], Field(min_length=2, max_length=2)] = about("of AdamW")
    eps: NonNegative = about("of AdamW")
    clip: Positive | None = about("largest gradient norm; null = no clipping")
    layer_decay: ShareAboveZero | None = about("factor of the learning rate from a block to the one below; null = none")
    schedule: Literal["cosine", "poly"] = about(
        "cosine after the warm-up | poly: linear over the run, times the warm-up"
    )
    warmup_start: Share = about("with poly, the warm-up rises from this share of the rate")

    def with_warmup_in_steps(self, samples: int | None, global_batch_size: int) -> OptimSettings:
        """A copy with the warm-up in optimiser steps instead of epochs.

        Raises AllRanksError if the number of images is needed and unknown.
        """
        if self.warmup_epochs is None:
            return self
        if samples is None:
            raise AllRanksError(
                f"optim.warmup_epochs={self.warmup_epochs:g} needs data.samples=N, the images of an epoch, which a "
                "stream does not know; or set optim.warmup_epochs=null optim.warmup_steps=N"
            )
        steps = round(self.warmup_epochs * samples / global_batch_size)
        return self.model_copy(update={"warmup_steps": steps, "warmup_epochs": None})


class RecipeSettings(Settings):
    """The recipe's global batch size and learning rate; a run with another batch size prints a hint."""

    global_batch_size: Count = about("images per optimiser step")
    lr: Positive = about("the learning rate for it")


class TrainerSettings(Settings):
    """Settings of lightning.Trainer; more can be added as +trainer.KEY=VALUE."""

    model_config = ConfigDict(extra="allow")
    defaults = "fit.yaml:trainer"

    accelerator: Text = about("auto, cpu, gpu or another of Lightning's accelerators")
    devices: Devices = about("per machine; auto = as many as torchrun or srun started, else all GPUs, else one process")
    num_nodes: Annotated[Literal["auto"] | Count, Rule("auto or a whole number of at least 1")] = about(
        "machines; auto = from torchrun or srun"
    )
    strategy: Text = about("auto = DDP on several devices; fsdp = network, gradients and optimiser sharded over them")
    precision: Any = about("auto = bf16-mixed on a GPU that has it, else 32-true")


class WandbSettings(Settings):
    """Weights & Biases."""

    defaults = "logger/wandb.yaml:wandb"

    project: Text | None = about("of Weights & Biases")
    mode: Literal["online", "offline", "disabled", "shared"] | None = about(
        "null = $WANDB_MODE, else online with an account, else offline"
    )


class TensorBoardSettings(Settings):
    """TensorBoard."""

    defaults = "logger/tensorboard.yaml:tensorboard"

    flush_secs: Seconds = about("longest time until a metric is in its file")


class LoggerSettings(Settings):
    """Loggers: logger=csv, wandb, tensorboard, or several as logger=[wandb,tensorboard]."""

    csv: Literal[True] = Field(True, description="metrics.csv, which every run has")
    wandb: WandbSettings | None = Field(None, description="Weights & Biases, by logger=wandb")
    tensorboard: TensorBoardSettings | None = Field(None, description="TensorBoard, by logger=tensorboard")

    @model_validator(mode="before")
    @classmethod
    def _of_one_kind(cls, given: Any) -> Any:
        """Settings of version 0.1, whose only logger beside metrics.csv was W&B: kind, project, mode."""
        if not isinstance(given, Mapping) or given.get("kind") not in ("csv", "wandb"):
            return given
        return {"wandb": {k: v for k, v in given.items() if k != "kind"}} if given["kind"] == "wandb" else {}


class FitSettings(Settings):
    """Settings of `fit`."""

    defaults = "fit.yaml"

    task: Text = about("what to train; set by the experiment")
    name: Name = about("of the run; its folder is run_dir")
    run_dir: PathStr = about("folder of the run", may_change=True)
    seed: Seed = about("of all random numbers")
    resume: Literal["auto", "never"] = about("auto: resume from the folder's last checkpoint | never: start over", True)

    epochs: Positive | None = about("length of the run, in epochs ...")
    steps: Count | None = about("... or in optimiser steps")
    global_batch_size: Count = about("images per optimiser step, over all processes")
    batch_size: Count = about("images per process and micro-batch; gradient accumulation does the rest", True)

    optim: OptimSettings
    recipe: RecipeSettings | None = about("the recipe's batch size and learning rate; null = no hint")

    log_every: Count = about("optimiser steps", True)
    val_every: Count = about("optimiser steps", True)
    val_minutes: Positive | None = about("also validate after this many minutes", True)
    save_every: Count = about("optimiser steps", True)
    save_minutes: Positive | None = about("also save after this many minutes", True)
    keep_every: Count | None = about("steps between checkpoints kept besides last, previous and best", True)
    max_nonfinite_steps: Count = about("stop after this many steps in a row with a non-finite gradient", True)
    preflight: Literal[True, "only"] = about("only: check data, tokenizer, disk and precision without starting", True)

    threads: Count | None = about("of torch on a CPU; null = torch's choice", True)
    compile: Compile = about("torch.compile; auto = on a GPU | reduce-overhead: CUDA graphs | max-autotune", True)
    deterministic: Switch = about("bit-identical runs on one kind of GPU, slower (CPU runs always are)", True)
    attention: Literal["auto", "sdpa", "triton"] = about("sdpa: torch's kernels | triton: our kernels, on a GPU", True)
    device_prefetch: Switch = about("on a GPU: copy, jitter and tokenize the next batch during the step", True)
    profile: Switch = about("trace of steps 11 to 15 and a table of the slowest operations, into profile/", True)
    optimize_ddp: Switch = about("split the compiled graph to overlap the gradient all-reduce with computation", True)
    gradient_compression: Literal[None, "bf16"] = about("bf16: halves what DDP sends, for slow networks", True)
    timeout_minutes: Minutes = about("longest wait for another process or a loader worker", True)

    trainer: TrainerSettings = about("settings of lightning.Trainer; more can be added as +trainer.KEY=VALUE", True)
    logger: LoggerSettings = about("logger=csv, wandb, tensorboard, or several: logger=[wandb,tensorboard]", True)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.run_dir)


class TestSettings(Settings):
    """Segmentation of whole images; null = as in the run."""

    scales: Annotated[list[ImageScale], Field(min_length=1)] | None = about(
        "such as [0.5,0.75,1,1.25,1.5,1.75], with flip=true the release's multi-scale test"
    )
    flip: Switch | None = about("average with the mirrored image")
    stride: ShareAboveZero | None = about("of the sliding window, as a fraction of its side")


class ValidationDataSettings(Settings):
    """Held-out images."""

    val: Paths | None = about("shard folder; null = the run's")


class ValidateSettings(Settings):
    """Settings of `validate`."""

    defaults = "validate.yaml"

    run: PathStr = about("folder of the run")
    data: ValidationDataSettings
    test: TestSettings
    trainer: TrainerSettings


class VisualizeSettings(Settings):
    """Settings of `visualize`."""

    defaults = "visualize.yaml"

    what: Literal["masked", "attention", "tokens", "curves", "layers"] | None = about(
        "masked | predicted | original; attention maps; token maps; curves; probes by layer; null = all available"
    )
    run: PathStr | None = about("folder of the run")
    runs: Paths | None = about("curves of several runs in one picture: runs=[runs/A,runs/B]")
    out: PathStr | None = about("picture file; null = in pictures/ of the run's folder (of the first of runs)")
    images: Count = about("rows; attention: at most 2 of the run's images")
    split: Name = about("val or train")
    photos: PathStr | None = about("attention: your images instead: a file, a folder or a tar")
    layers: Annotated[list[Count], Field(min_length=1)] | None = about("attention: blocks from 1; null = three of them")
    heads: Annotated[list[Count], Field(min_length=1)] | None = about("attention: heads from 1; null = all")
    patches: Annotated[list[PatchPlace], Field(min_length=1)] | None = about(
        "attention: [[row,column],...] from 0; null = three along the diagonal"
    )
    metrics: Annotated[list[Text], Field(min_length=1)] | None = about(
        "curves: metrics to draw, one axis each, such as [train/lr,val/accuracy]; null = loss and accuracy"
    )


class SweepSettings(Settings):
    """Settings of a sweep (`fit -m`)."""

    defaults = "sweep.yaml"

    jobs: Count = about("runs at once on this machine (and with hydra/launcher=submitit_local), sharing its GPUs")
