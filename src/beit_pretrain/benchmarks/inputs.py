"""What is measured: an experiment's network and optimiser, and batches for it.

The encoder has OpenAI's architecture and random weights, unless `tokenizer.path` names another. Images are random,
since their contents cost no time; masks, positions and jitter are those of a run.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from beit_pretrain.benchmarks.measure import Clock, seconds_of
from beit_pretrain.config import as_user_errors
from beit_pretrain.data.order import MASK, generator
from beit_pretrain.engine.optim import configure
from beit_pretrain.engine.speed import compile_mode, make_deterministic, set_attention
from beit_pretrain.engine.trainer import wanted_gpu
from beit_pretrain.errors import UserError
from beit_pretrain.models.backbone import MaskedImageModel
from beit_pretrain.models.build import network
from beit_pretrain.models.checkpoints.init_from import normalisation
from beit_pretrain.settings import to_dict
from beit_pretrain.tasks.pretrain import Pretraining
from beit_pretrain.tokenizers.tokenizer import OpenAITokenizer, Tokenizer
from beit_pretrain.transforms.jitter import ORDERS, jittered_view, normalise
from beit_pretrain.transforms.masking import BlockwiseMask
from beit_pretrain.transforms.mean_color_grid import SIDE

PRECISIONS, GPUS = ("auto", "32-true", "bf16-mixed"), ("gpu", "cuda")


class Batch(NamedTuple):
    """The same images in the form that every variant takes, on the device."""

    ours: dict[str, Tensor]  # uint8 views, jitter, mask, mask_index, position, tokens
    view: Tensor  # (B, C, H, W) float32 in [0, 1]
    image: Tensor  # the same, normalised
    token_image: Tensor  # (B, C, h, w) float32 in [0, 1]
    token_M: Tensor  # tokens of the masked patches

    def without(self, name: str) -> dict[str, Tensor]:
        """A loader's batch: without "tokens", or without the "token_image" that they are made of."""
        return {key: tensor for key, tensor in self.ours.items() if key != name}


class Bench(NamedTuple):
    """What is measured: our module, its tokenizer and masks, device and precision."""

    module: Pretraining
    tokenizer: Tokenizer
    masking: BlockwiseMask
    batch_size: int
    device: torch.device
    bf16: bool
    now: Clock  # `bench.clock`
    about: dict[str, Any]  # device and settings, for the results

    @property
    def model(self) -> MaskedImageModel:
        return self.module.model

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds of some work, waited for."""
        return seconds_of(work, self.device, self.now)

    def optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Fused AdamW with the experiment's settings, for our network or another one."""
        return configure(model or self.model, self.module.optim, total_steps=10**9)["optimizer"]

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


def check_settings(cfg: Any) -> None:
    """Raise UserError for other tasks than pre-training and for settings that `bench` would ignore."""
    given, on_gpu = cfg.trainer, wanted_gpu(cfg.trainer.accelerator)
    for wrong, message in (
        (cfg.task != "pretrain", f"the task pretrain; this experiment is of task {cfg.task}"),
        (given.precision not in PRECISIONS, f"trainer.precision={', '.join(PRECISIONS)}, not {given.precision}"),
        (given.accelerator not in ("auto", "cpu", *GPUS), f"trainer.accelerator=cpu or gpu, not {given.accelerator}"),
        (given.accelerator in GPUS and not on_gpu, f"trainer.accelerator={given.accelerator}: this machine has no GPU"),
        (given.devices not in ("auto", 1), f"one process: trainer.devices must be auto or 1, not {given.devices}"),
        (given.num_nodes not in ("auto", 1), f"one process: trainer.num_nodes must be 1, not {given.num_nodes}"),
        (getattr(cfg, "init_from", None), "a network of random weights, its shape from model.*; leave init_from= out"),
        (on_gpu and cfg.bench.clock == "cpu", "a CPU's work by bench.clock=cpu; on a GPU it must be wall"),
    ):
        if wrong:
            raise UserError(f"bench measures {message}")


def make_bench(cfg: Any) -> Bench:
    """The experiment's network, optimiser and masks. Raises UserError for settings that cannot be measured."""
    check_settings(cfg)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    on_gpu = wanted_gpu(cfg.trainer.accelerator)
    device = torch.device("cuda" if on_gpu else "cpu")
    bf16 = cfg.trainer.precision == "bf16-mixed" or (cfg.trainer.precision == "auto" and on_gpu)
    if cfg.deterministic:
        make_deterministic(on_gpu)
    torch.backends.cudnn.benchmark = not cfg.deterministic  # as in `fit`
    with as_user_errors():
        tokenizer: Tokenizer
        if cfg.tokenizer and cfg.tokenizer.path:
            tokenizer = instantiate(to_dict(cfg.tokenizer))
        else:
            from dall_e.encoder import Encoder

            tokenizer = OpenAITokenizer.of(Encoder().eval().requires_grad_(False))
        model = MaskedImageModel(tokenizer.vocab_size, **network(cfg)).to(device)
        model.set_grad_checkpointing(cfg.activation_checkpointing)
        set_attention(model, cfg.attention, on_gpu, cfg.trainer.precision)
        optim = cfg.optim.model_copy(update={"warmup_epochs": None, "warmup_steps": 0})
        module = Pretraining(model, tokenizer, optim, *normalisation(cfg, {}), cfg.seed).to(device)
        module.setup("fit")
        module.compile_mode = compile_mode(cfg.compile, on_gpu, sharded=False)
        if module.compile_mode is not None:
            torch._dynamo.config.suppress_errors = False  # a failed compilation is an error here, not a slower step
        masking = BlockwiseMask(grid=model.grid, **to_dict(cfg.mask))
    about = {
        "experiment": cfg.name,
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        "clock": cfg.bench.clock,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": "bf16-mixed" if bf16 else "32-true",
        "compile": module.compile_mode,
        "batch_size": cfg.batch_size,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    now = time.process_time if cfg.bench.clock == "cpu" else time.perf_counter
    return Bench(module, tokenizer, masking, cfg.batch_size, device, bf16, now, about)


def make_batch(bench: Bench, number: int) -> Batch:
    """Random images, real masks, positions of batch `number` of a run."""
    rng = torch.Generator().manual_seed(number)
    masks, index = make_masks(bench, number)
    batch, (height, width), channels = len(masks), bench.model.grid, bench.model.config["in_chans"]

    def levels(*shape: int, below: int = 256, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.randint(below, (batch, *shape), generator=rng, dtype=dtype)

    def pixels(patch: int) -> Tensor:
        return levels(height * patch, width * patch, channels).permute(0, 3, 1, 2)

    ours = {
        "image": pixels(bench.model.config["patch_size"]),
        "token_image": pixels(bench.tokenizer.downsample),
        "jitter_factors": 0.6 + 0.8 * torch.rand(batch, 3, generator=rng),
        "jitter_order": torch.from_numpy(ORDERS)[levels(below=len(ORDERS), dtype=torch.int64)],
        "jitter_tiles": levels(SIDE**2, channels),
        "mask": masks,
        "mask_index": index,
        "position": torch.arange(batch) + number * batch,
        "tokens": levels(height * width, below=bench.tokenizer.vocab_size, dtype=torch.int64),
    }
    ours = {name: tensor.to(bench.device) for name, tensor in ours.items()}
    view, token_image = jittered_view(ours, "image"), jittered_view(ours, "token_image")
    image = normalise(view, bench.module.mean, bench.module.std)
    return Batch(ours, view, image, token_image, ours["tokens"][ours["mask"]])


def make_masks(bench: Bench, number: int) -> tuple[Tensor, Tensor]:
    """Masks (B, N) of batch `number` of a run, and the indices of the masked patches (B, K), padded with -1."""
    positions = range(number * bench.batch_size, (number + 1) * bench.batch_size)
    masks = np.stack([bench.masking.draw(generator(0, p, MASK)).reshape(-1) for p in positions])
    index = np.full((len(masks), bench.masking.max_patches), -1)
    for row, mask in zip(index, masks, strict=True):
        row[: mask.sum()] = np.flatnonzero(mask)
    return torch.from_numpy(masks), torch.from_numpy(index)
