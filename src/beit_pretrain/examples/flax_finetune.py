"""Fine-tunes a classifier in Flax with optax, and saves it as a Hugging Face folder.

    python -m beit_pretrain.examples.flax_finetune CHECKPOINT TRAIN --val VAL --out FOLDER

CHECKPOINT is any BEiT that `load_pretrained` reads; TRAIN and VAL are what `data.train` takes, such as a folder of
class folders. The recipe is that of the task `finetune` in short: random resized crops and flips, label smoothing,
AdamW with a learning rate that decays from block to block. Shapes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from beit_pretrain.data.datamodule import ClassificationData
from beit_pretrain.data.dataset import BatchSchedule
from beit_pretrain.engine.optim import NO_DECAY, layer_of
from beit_pretrain.errors import UserError
from beit_pretrain.flax import FlaxBeitForImageClassification
from beit_pretrain.flax.weights import name_of
from beit_pretrain.models.checkpoints.formats import read_checkpoint
from beit_pretrain.models.checkpoints.hub import local_copy
from beit_pretrain.transforms.jitter import HALF, normalise, per_channel
from beit_pretrain.transforms.views import ClassificationTransform

Parameters = Any  # a tree of arrays


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m beit_pretrain.examples.flax_finetune",
        description="Fine-tune a classifier in Flax with optax.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("checkpoint", help="any BEiT that load_pretrained reads")
    parser.add_argument("train", help="labelled images: a folder of class folders, a tar, shards, ...")
    parser.add_argument("--val", help="held-out images of the same classes")
    parser.add_argument("--out", default="flax_classifier", help="the folder to write")
    parser.add_argument("--image-size", type=int, help="pixels; that of the checkpoint if not given")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of the head")
    parser.add_argument(
        "--layer-decay", type=float, default=0.75, help="factor of the rate from a block to the one below"
    )
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--drop-path", type=float, default=0.1, help="stochastic depth of the last block")
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--bfloat16", action="store_true", help="compute products in bfloat16")
    parser.add_argument("--num-workers", type=int, default=0, help="loader processes")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(words)
    for name in ("steps", "batch_size"):
        if getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return given


def optimizer(
    steps: int, lr: float, depth: int, layer_decay: float, weight_decay: float
) -> optax.GradientTransformation:
    """AdamW as in engine/optim.py: warm-up and cosine, rates that decay with depth, biases and norms not decayed."""

    def decayed(path: Any, value: Array) -> bool:
        name = parameter_name(path)
        return value.ndim > 1 and name not in NO_DECAY

    def scaled(path: Any, update: Array) -> Array:
        return update * layer_decay ** (depth + 1 - layer_of(parameter_name(path), depth))

    rate = optax.warmup_cosine_decay_schedule(0.0, lr, max(1, steps // 10), steps)
    by_path = jax.tree_util.tree_map_with_path
    return optax.chain(
        optax.adamw(rate, b2=0.999, weight_decay=weight_decay, mask=partial(by_path, decayed)),
        optax.stateless(lambda updates, _: by_path(scaled, updates)),
    )


def parameter_name(path: Any) -> str:
    """blocks.0.attn.proj.weight, from the path of a leaf."""
    return name_of(tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey)))


def smoothed_loss(model: FlaxBeitForImageClassification, image: Array, label: Array, smoothing: float) -> Array:
    """Mean cross-entropy with smoothed labels."""
    logits = model(image).logits
    target = jax.nn.one_hot(label, logits.shape[1]) * (1 - smoothing) + smoothing / logits.shape[1]
    return optax.softmax_cross_entropy(logits, target).mean()


@nnx.jit
def train_step(model: Any, optim: nnx.Optimizer, image: Array, label: Array, smoothing: float) -> Array:
    """One step, in place; returns the loss."""
    loss, gradients = nnx.value_and_grad(smoothed_loss)(model, image, label, smoothing)
    optim.update(model, gradients)
    return loss


@nnx.jit
def correct(model: FlaxBeitForImageClassification, image: Array, label: Array) -> Array:
    """How many images are classified correctly."""
    return (model(image).logits.argmax(1) == label).sum()


def batch_of(batch: dict[str, Any], about: dict[str, Any]) -> tuple[Array, Array]:
    """Normalised images (B, C, H, W) and labels (B,) of a batch of the data module."""
    image_BCHW = normalise(batch["image"].float() / 255, about["mean"], about["std"])
    return jnp.asarray(image_BCHW.numpy()), jnp.asarray(batch["label"].numpy())


def accuracy(model: FlaxBeitForImageClassification, data: ClassificationData) -> float:
    """The share of held-out images that are classified correctly."""
    dataset, hits, images = data.eval_dataset("val"), 0, 0
    model.eval()
    for batch in data.loader(dataset, range(len(dataset))):
        image, label = batch_of(batch, model.about)
        hits, images = hits + int(correct(model, image, label)), images + len(label)
    return hits / images


def open_data(given: argparse.Namespace, size: int, channels: Any) -> ClassificationData:
    """The data module. Raises UserError if images have no class."""
    views = {"image_size": size, "channels": channels}
    train, held_out = (ClassificationTransform(train=training, **views) for training in (True, False))
    settings = {"seed": given.seed, "channels": channels, "num_workers": given.num_workers}
    data = ClassificationData(
        given.train,
        given.val,
        train_views=train,
        val_views=held_out,
        global_batch_size=given.batch_size,
        **settings,
    )
    loose = sum(reader.without_class for reader in data.readers.values())
    if len(data.classes) < 2 or loose:
        raise UserError(f"{given.train} has {len(data.classes)} classes, and {loose} images have none")
    return data


def finetune(given: argparse.Namespace) -> float | None:
    """Train, print losses, write the folder; returns the accuracy on the held-out images, if there are any."""
    path = local_copy(given.checkpoint)
    architecture = read_checkpoint(path).architecture
    size, channels = given.image_size or architecture["image_size"], architecture["in_chans"]
    if not isinstance(size, int):
        raise UserError(f"{given.checkpoint} is for images of {size} pixels, not for square ones: give --image-size")
    data = open_data(given, size, channels)
    model = FlaxBeitForImageClassification.from_pretrained(
        path,
        image_size=size,
        num_labels=len(data.classes),
        dtype=jnp.bfloat16 if given.bfloat16 else jnp.float32,
        drop_path_rate=given.drop_path,
        rngs=nnx.Rngs(given.seed),
    )
    half = per_channel(HALF, channels, "mean")
    about = {"mean": model.about.get("mean", half), "std": model.about.get("std", half)}
    model.about = {**about, "classes": data.classes}
    tx = optimizer(given.steps, given.lr, model.config["depth"], given.layer_decay, given.weight_decay)
    optim = nnx.Optimizer(model, tx, wrt=nnx.Param)
    model.train()
    dataset = data.train_dataset(BatchSchedule(given.batch_size))
    for step, batch in enumerate(data.loader(dataset, range(given.steps)), start=1):
        loss = train_step(model, optim, *batch_of(batch, about), given.label_smoothing)
        if step == 1 or step % 50 == 0 or step == given.steps:
            print(f"step {step:5} loss {loss:.4f}", flush=True)
    found = accuracy(model, data) if given.val is not None else None
    if found is not None:
        print(f"accuracy {found:.4f} on {data.readers['val'].samples} held-out images", flush=True)
    model.save_pretrained(given.out)
    print(f"wrote {given.out}")
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Entry point. Returns 0, or 2 for errors that the user can fix."""
    try:
        finetune(arguments(words))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
