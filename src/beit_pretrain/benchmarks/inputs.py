"""What `bench step`, `loop` and `memory` measure: an experiment's network and optimiser, and batches for it.

The encoder has OpenAI's architecture and random weights, unless `tokenizer.path` names another; images are random,
since what is in them costs no time; masks, positions and jitter are those of a run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import AdamW

from beit_pretrain.data.order import MASK, generator
from beit_pretrain.engine.optim import Optim, configure
from beit_pretrain.engine.speed import compile_mode, make_deterministic, set_attention
from beit_pretrain.engine.trainer import as_user_errors, wanted_gpu
from beit_pretrain.errors import UserError
from beit_pretrain.models.backbone import Architecture, MaskedImageModel, patch_grid
from beit_pretrain.models.build import network
from beit_pretrain.tasks.pretrain import Pretraining
from beit_pretrain.tokenizers.tokenizer import OpenAITokenizer, Tokenizer
from beit_pretrain.transforms.jitter import ORDERS, jittered_view, normalise, per_channel
from beit_pretrain.transforms.masking import BlockwiseMask
from beit_pretrain.transforms.mean_color_grid import SIDE


class Batch(NamedTuple):
    """The same images as everyone's loader would bring them, on the device."""

    ours: dict[str, Tensor]  # uint8 views, jitter, mask, mask_index, position, tokens
    view: Tensor  # (B, C, H, W) float32 in [0, 1]
    image: Tensor  # the same, normalised
    token_image: Tensor  # (B, C, h, w) float32 in [0, 1]
    token_M: Tensor  # tokens of the masked patches

    @property
    def size(self) -> int:
        return len(self.image)


class Bench(NamedTuple):
    """What is measured: our module, the shapes of its inputs, where and how it runs."""

    module: Pretraining
    architecture: Architecture
    tokenizer: Tokenizer
    masking: BlockwiseMask
    batch_size: int
    device: torch.device
    bf16: bool
    now: Callable[[], float]  # seconds, of `bench.clock`

    @contextmanager
    def precision(self) -> Iterator[None]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            yield

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Inside, the module's functions run as they are written.

        Counters that hook into torch's dispatcher need that: a compiled function called under one of them is never
        compiled afterwards.
        """
        mode, self.module.compile_mode = self.module.compile_mode, None
        try:
            yield
        finally:
            self.module.compile_mode = mode

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


PRECISIONS = ("auto", "32-true", "bf16-mixed")


def check_settings(cfg: DictConfig) -> None:
    """Raise UserError for settings of `fit` that a measurement would not obey."""
    settings = cfg.trainer
    if settings.precision not in PRECISIONS:
        raise UserError(f"bench measures trainer.precision={', '.join(PRECISIONS)}, not {settings.precision}")
    if settings.accelerator not in ("auto", "cpu", "gpu", "cuda"):
        raise UserError(f"bench measures on trainer.accelerator=cpu or gpu, not {settings.accelerator}")
    if settings.accelerator in ("gpu", "cuda") and not wanted_gpu(settings.accelerator):
        raise UserError(f"trainer.accelerator={settings.accelerator}: this machine has no GPU")
    for name in ("devices", "num_nodes"):
        if settings[name] not in ("auto", 1):
            raise UserError(f"bench measures one process: trainer.{name} must be auto or 1, not {settings[name]}")
    if cfg.get("init_from"):
        raise UserError("bench measures a network of random weights, its shape from model.*; leave init_from= out")


def make_bench(cfg: DictConfig) -> Bench:
    """The experiment's network, optimiser and masks. Raises UserError for another task than pre-training."""
    if cfg.task != "pretrain":
        raise UserError(f"bench measures pre-training; +experiment= is one of task {cfg.task}")
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    on_gpu = wanted_gpu(cfg.trainer.accelerator)
    if cfg.deterministic:
        make_deterministic(cfg.task, on_gpu)
    device = torch.device("cuda" if on_gpu else "cpu")
    if on_gpu and cfg.bench.clock == "cpu":
        raise UserError("bench.clock=cpu measures a CPU's work; on a GPU it must be wall")
    bf16 = cfg.trainer.precision == "bf16-mixed" or (cfg.trainer.precision == "auto" and on_gpu)
    with as_user_errors():
        tokenizer = make_tokenizer(cfg)
        architecture = network(cfg)
        model = MaskedImageModel(tokenizer.vocab_size, **architecture).to(device)
        model.set_grad_checkpointing(cfg.activation_checkpointing)
        set_attention(model, cfg.attention, on_gpu, cfg.trainer.precision)
        settings = {name: value for name, value in cfg.optim.items() if name not in ("warmup_epochs", "warmup_steps")}
        mean, std = (per_channel(cfg[name] or (0.5,), cfg.data.channels, name) for name in ("mean", "std"))
        module = Pretraining(model, tokenizer, Optim(**cast(dict[str, Any], settings)), mean, std, cfg.seed).to(device)
        module.setup("fit")
        module.compile_mode = compile_mode(cfg.compile, on_gpu, sharded=False)
        if module.compile_mode is not None:
            torch._dynamo.config.suppress_errors = False  # a failed compilation is an error here, not a slower step
        torch.backends.cudnn.benchmark = not cfg.deterministic  # as in `fit`
        masking = BlockwiseMask(patch_grid(cfg.image_size, architecture["patch_size"]), **cfg.mask)
    full = {**model.config, **architecture}
    now = time.process_time if cfg.bench.clock == "cpu" else time.perf_counter
    return Bench(module, full, tokenizer, masking, cfg.batch_size, device, bf16, now)


def make_tokenizer(cfg: DictConfig) -> Tokenizer:
    """The config's tokenizer, or one of OpenAI's architecture with random weights."""
    asked = cfg.get("tokenizer")
    if asked is not None and asked.get("path"):
        tokenizer: Tokenizer = instantiate(asked)
        return tokenizer
    from dall_e.encoder import Encoder

    return OpenAITokenizer.of(Encoder().eval().requires_grad_(False))


def make_batch(bench: Bench, number: int) -> Batch:
    """Random images (what is in them costs no time), real masks, positions of batch `number` of a run."""
    draw = torch.Generator().manual_seed(number)
    masks, index = make_masks(bench, number)
    height, width = bench.module.model.grid
    patch, channels = bench.architecture["patch_size"], bench.architecture["in_chans"]
    small = bench.tokenizer.downsample

    def pixels(side: int) -> Tensor:
        shape = (len(masks), height * side, width * side, channels)
        return torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8).permute(0, 3, 1, 2)

    ours = {
        "image": pixels(patch),
        "token_image": pixels(small),
        "jitter_factors": 0.6 + 0.8 * torch.rand(len(masks), 3, generator=draw),
        "jitter_order": torch.from_numpy(ORDERS)[torch.randint(len(ORDERS), (len(masks),), generator=draw)],
        "jitter_tiles": torch.randint(0, 256, (len(masks), SIDE**2, channels), generator=draw, dtype=torch.uint8),
        "mask": masks,
        "mask_index": index,
        "position": torch.arange(len(masks)) + number * len(masks),
        "tokens": torch.randint(bench.tokenizer.vocab_size, masks.shape, generator=draw),
    }
    ours = {name: tensor.to(bench.device) for name, tensor in ours.items()}
    view, token_image = jittered_view(ours, "image"), jittered_view(ours, "token_image")
    image = normalise(view, bench.module.mean, bench.module.std)
    return Batch(ours, view, image, token_image, ours["tokens"][ours["mask"]])


def make_masks(bench: Bench, number: int) -> tuple[Tensor, Tensor]:
    """Masks (B, N) of batch `number` of a run, and the numbers of the masked patches (B, K), filled up with -1."""
    positions = range(number * bench.batch_size, (number + 1) * bench.batch_size)
    masks = np.stack([bench.masking.draw(generator(0, p, MASK)).reshape(-1) for p in positions])
    index = np.full((len(masks), bench.masking.max_patches), -1)
    for row, mask in zip(index, masks, strict=True):
        row[: mask.sum()] = np.flatnonzero(mask)
    return torch.from_numpy(masks), torch.from_numpy(index)


def configured(model: nn.Module, optim: Optim) -> AdamW:
    """Fused AdamW with the experiment's settings."""
    optimizer: AdamW = configure(model, optim, total_steps=10**9)["optimizer"]
    return optimizer
