"""The verb `tokenize`: writes the token ids of fixed views of every image (file format: token_cache.py).

View v of sample n depends only on (seed, v, n), and a token file only on the views of its shard. So any number of
machines can work on parts of a set, in any order and with restarts (token_writer.py), and the result is the same.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from hydra.utils import instantiate
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from beit_pretrain.config import as_user_errors
from beit_pretrain.data.manifest import MANIFEST
from beit_pretrain.data.order import CACHED_VIEW, Sample, generator
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.data.storage import is_remote
from beit_pretrain.errors import UserError, first_line, stop_if_memory_was_short
from beit_pretrain.fileio import expand_home
from beit_pretrain.models.backbone import patch_grid
from beit_pretrain.processes import cores, end_with_parent
from beit_pretrain.settings import to_dict
from beit_pretrain.tokenizers.settings import TokenizeSettings
from beit_pretrain.tokenizers.token_cache import FORMAT, images_digest, record_dtype, tokens_name, view_settings
from beit_pretrain.tokenizers.token_writer import begin, finish, is_finished, is_whole, save, summary, work_folder
from beit_pretrain.tokenizers.tokenizer import Tokenizer, check_channels, view_size
from beit_pretrain.transforms.image_io import open_image, reason
from beit_pretrain.transforms.jitter import jittered_view
from beit_pretrain.transforms.mean_color_grid import SIDE
from beit_pretrain.transforms.settings import ViewSettings
from beit_pretrain.transforms.views import TwoViewTransform

SHOWN = 20  # undecodable images that warnings name, at most


class Chunk(NamedTuple):
    """Samples [start, stop) of a shard; all their views go through the tokenizer in one batch."""

    shard: int
    start: int
    stop: int


class TokenizeOptions(NamedTuple):
    """How tokens are computed. Parts of a set may differ in these, but not in the type of the device."""

    part: tuple[int, int] = (0, 1)  # k of n: shards k, k + n, k + 2n, ...
    batch_size: int = 64  # views at once
    num_workers: int = 0
    device: torch.device = torch.device("cpu")


ALL_AT_ONCE = TokenizeOptions()


def tokenize(cfg: TokenizeSettings) -> None:
    """Write the tokens of one or more shard folders, into `out` or the folder `tokens` of each."""
    sources = [cfg.src] if isinstance(cfg.src, str) else cfg.src
    if len(sources) > 1 and cfg.out:
        raise UserError("out= takes the tokens of one data set; those of a list lie in each one's own folder tokens")
    for source in sources:
        path = None if is_remote(source) else expand_home(source)
        if not cfg.out and (path is None or (path.exists() and not (path / MANIFEST).is_file())):
            raise UserError(f"{source} is no local shard folder: out= must say where its tokens go, such as out=FOLDER")
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    if cfg.tokenizer is None or not cfg.tokenizer.target:
        raise UserError("a tokenizer is needed: tokenizer=openai or tokenizer=dvae, with tokenizer.path=")
    with as_user_errors():
        tokenizer: Tokenizer = instantiate(to_dict(cfg.tokenizer))
        check_channels(tokenizer, cfg.channels)
        views, grid = make_views(cfg, tokenizer)
        device = device_of(cfg.accelerator)
        tokenizer.to(device)
    number, parts = (int(word) for word in (cfg.part or "0/1").split("/"))
    if number >= parts:
        raise UserError(f"part={cfg.part}: parts of {parts} are 0/{parts} to {parts - 1}/{parts}")
    num_workers = cores() if cfg.num_workers is None else cfg.num_workers
    how = TokenizeOptions((number, parts), cfg.batch_size, num_workers, device)
    for source in sources:
        reader = ShardReader(source, cfg, cfg.split or "train")
        out = Path(cfg.out or Path(source) / "tokens")
        if make_tokens(reader, out, tokenizer, views, grid, cfg.views, cfg.seed, how):
            print(f"made {out}\n{summary(out)}\nuse them with data.tokens={out}")


def make_views(cfg: TokenizeSettings, tokenizer: Tokenizer) -> tuple[TwoViewTransform, tuple[int, int]]:
    """The views that the settings describe, and the grid of their patches."""
    grid = patch_grid(cfg.image_size, cfg.patch_size or 16)
    settings = {name: getattr(cfg, name) for name in ViewSettings.model_fields}
    settings["token_image_size"] = view_size(grid, tokenizer, cfg.token_image_size)
    return TwoViewTransform(image_size=cfg.image_size, **settings), grid


def device_of(accelerator: str) -> torch.device:
    """The device for "auto", "cpu" or "cuda". Raises UserError if there is none."""
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError("accelerator=cuda, but there is no CUDA device")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def make_tokens(
    reader: ShardReader,
    out: Path,
    tokenizer: Tokenizer,
    views: TwoViewTransform,
    grid: tuple[int, int],
    count: int,
    seed: int = 0,
    how: TokenizeOptions = ALL_AT_ONCE,
) -> bool:
    """Compute the missing tokens of a part; publish the set once it is complete. Returns whether it is complete.

    `tokenizer`: already on the device; `count`: views per image. An unfinished set of the same settings is resumed, a
    finished one is left unchanged. Raises UserError for other settings, or if `out` cannot be written.
    """
    if tokenizer.vocab_size > 2**16:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size:,} tokens; at most 65,536 can be stored")
    plan = {
        "format": FORMAT,
        "images": {"samples": reader.samples, "sha256": images_digest(reader.shards)},
        "tokenizer": {
            "name": type(tokenizer).__name__,
            "sha256": tokenizer.digest(),
            "vocab_size": tokenizer.vocab_size,
        },
        "views": count,
        "seed": seed,
        "grid": list(grid),
        "view": view_settings(views),
        "device": how.device.type,
        "Pillow": PIL.__version__,
    }
    with work_folder(out, how.part) as work:
        if is_finished(out, plan):
            shutil.rmtree(work, ignore_errors=True)
            return True
        begin(work, plan)
        try:
            _write_part(work / out.name, tokenizer, TokenViews(reader, views, count, seed, grid[0] * grid[1]), how)
        except FileNotFoundError:  # meanwhile another process has finished the set
            if not is_finished(out, plan):
                raise
            return True
        return finish(work, out, plan, reader)


class TokenViews(Dataset):
    """Item `Chunk`: views of its samples for the tokenizer, and the records that their tokens go into."""

    def __init__(self, reader: ShardReader, views: TwoViewTransform, count: int, seed: int, patches: int):
        self.reader, self.views, self.count, self.seed, self.patches = reader, views, count, seed, patches
        self.first = np.cumsum([0, *reader.sizes])

    def __getitem__(self, chunk: Chunk) -> dict[str, Any]:
        """`token_image` (n, C, h, w) uint8, `jitter_factors` and `jitter_order` (n, 3), `records` (n,), tokens 0,
        `bad`: (key, reason) of the images that cannot be decoded. n is samples times views."""
        if chunk.start == 0:  # the set records the manifest's digests: check each shard once
            self.reader.check_content(chunk.shard)
        records = np.zeros((chunk.stop - chunk.start) * self.count, record_dtype(self.patches))
        arrays, bad = [], []
        for row in range(chunk.start, chunk.stop):
            sample, here = Sample(chunk.shard, row), (row - chunk.start) * self.count
            data = self.reader.read(sample).data
            try:
                made = [self._made(data, sample, view, records[here + view]) for view in range(self.count)]
            except Exception as error:  # Pillow's decoders raise nearly everything on broken files
                name = f"{self.reader.key(sample)} of {self.reader.where(chunk.shard)}"
                stop_if_memory_was_short(error, name)
                bad.append((name, reason(error)))
                records[here : here + self.count] = np.zeros((), records.dtype)
                made = [self._nothing()] * self.count
            arrays += made
        # Arrays, not tensors: arrays go through a pipe, tensors would need shared memory, which may be short.
        batch = {name: np.stack([a[name] for a in arrays]) for name in arrays[0]}
        return {**batch, "records": records, "bad": bad}

    def _made(self, data: bytes, sample: Sample, view: int, record: np.void) -> dict[str, np.ndarray]:
        """One view of an image; notes in `record` how it was made."""
        number = int(self.first[sample.shard]) + sample.row
        with open_image(data) as image:
            drawn = self.views.draw(image.size, generator(self.seed, view << 40 | number, CACHED_VIEW))
            arrays = self.views.apply(image, drawn, names=("token_image",))
        record["crop"], record["flip"] = drawn.crop, drawn.flip
        record["jitter_factors"], record["jitter_order"] = drawn.jitter.factors, drawn.jitter.order
        return arrays

    def _nothing(self) -> dict[str, np.ndarray]:
        side = self.views.token_image_size or 1
        image = np.zeros((self.views.channels, side, side), np.uint8)
        return {
            "token_image": image,
            "jitter_factors": np.ones(3, np.float32),
            "jitter_order": np.arange(3),
            "jitter_tiles": np.zeros((SIDE * SIDE, self.views.channels), np.uint8),
        }


def _write_part(folder: Path, tokenizer: Tokenizer, views: TokenViews, how: TokenizeOptions) -> None:
    """Write the missing files of a part. Raises UserError or OSError."""
    reader = views.reader
    shards = range(how.part[0], len(reader.sizes), how.part[1])
    files = {shard: folder / tokens_name(reader.shards[shard].name) for shard in shards}
    missing = [s for s in shards if not is_whole(files[s], (reader.sizes[s], views.count), views.patches)]
    step = max(1, how.batch_size // views.count)
    chunks = [Chunk(s, i, min(i + step, reader.sizes[s])) for s in missing for i in range(0, reader.sizes[s], step)]
    for shard in missing:
        if not reader.sizes[shard]:
            save(files[shard], np.zeros((0, views.count), record_dtype(views.patches)))
    total, left = (sum(reader.sizes[s] for s in some) for some in (shards, missing))
    loader = DataLoader(
        views,
        batch_size=None,
        sampler=chunks,
        num_workers=min(how.num_workers, len(chunks)),
        collate_fn=dict,  # by default arrays would become tensors
        worker_init_fn=end_with_parent,
    )
    records: list[np.ndarray] = []
    bad: list[tuple[str, str]] = []
    try:
        with tqdm(total=total, initial=total - left, unit=" images", desc="tokenize") as bar:
            for chunk, batch in zip(chunks, loader):
                records.append(encoded(tokenizer, batch, how.device))
                bad += batch["bad"]
                if chunk.stop == reader.sizes[chunk.shard]:
                    save(files[chunk.shard], np.concatenate(records).reshape(-1, views.count))
                    records = []
                bar.update(chunk.stop - chunk.start)
    except RuntimeError as error:  # torch's, where memory is short on the device or in a worker
        raise UserError(
            f"tokenizing on {how.device} failed: {first_line(error)}; finished shards are kept; rerun the same command "
            "to resume, with a smaller batch_size= or fewer num_workers= if memory is short"
        ) from error
    for key, why in bad[:SHOWN]:
        print(f"warning: {key} cannot be decoded ({why}); it has no tokens, a neighbour will stand in for it")
    if len(bad) > SHOWN:
        print(f"warning: and {len(bad) - SHOWN:,} more images")


def encoded(tokenizer: Tokenizer, batch: dict[str, Any], device: torch.device) -> np.ndarray:
    """The records (n,) of a batch of `TokenViews`, filled with their tokens."""
    records: np.ndarray = batch["records"]
    views = ("token_image", "jitter_factors", "jitter_order", "jitter_tiles")
    on_device = {name: torch.from_numpy(batch[name]).to(device) for name in views}
    records["tokens"] = tokenizer.encode(jittered_view(on_device, "token_image")).cpu().numpy()
    records["tokens"][records["crop"][:, 2] == 0] = 0
    return records
