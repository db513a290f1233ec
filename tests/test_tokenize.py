"""The verb `tokenize`: tokens of recorded views, pre-training from them, and errors."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import spoil, write_checkpoint

from beit_pretrain.data.order import CACHED_VIEW, Sample, generator
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.tokenizers import tokenize as tokenizing
from beit_pretrain.tokenizers.dvae import DiscreteVAE, DVAETokenizer
from beit_pretrain.tokenizers.token_cache import TokenFolder, record_dtype
from beit_pretrain.transforms.image_io import open_image
from beit_pretrain.transforms.jitter import jittered_views
from beit_pretrain.transforms.views import TwoViewTransform

TINY = "image_size=32 patch_size=8 num_workers=0 threads=1 accelerator=cpu".split()
MODEL = (
    "image_size=32 patch_size=8 mask.max_patches=6 mask.min_block=1 global_batch_size=8 "
    "data.num_workers=0 steps=3 val_every=3 "
    "model.embed_dim=32 model.num_heads=2 model.depth=2 data.val_images=8 log_every=1 threads=1 data.scale=[0.08,1] "
    "data.ratio=[0.75,1.3333333333333333] data.jitter=[0.4,0.4,0.4] trainer.accelerator=cpu"
).split()


@pytest.fixture
def words(dvae_checkpoint) -> list[str]:
    return ["tokenize", "tokenizer=dvae", f"tokenizer.path={dvae_checkpoint}", *TINY]


@pytest.fixture
def copied(shards, tmp_path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "data"))


@pytest.mark.parametrize("more", [[], ["jitter=null"], ["pil_reference=true"], ["num_workers=1", "batch_size=3"]])
def test_tokens_match_recorded_views(more, words, copied, dvae_checkpoint, run_cli):
    code, stdout, stderr = run_cli(*words, f"data={copied / 'train'}", "views=2", "seed=5", *more)
    assert code == 0, stderr
    assert "50 images x 2 views x 4 x 4 tokens of 32" in stdout
    folder = copied / "train/tokens"
    assert f"data.tokens={folder}" in stdout
    settings = {"jitter": (0, 0, 0)} if "jitter=null" in more else {"pil_reference": "pil_reference=true" in more}
    views, tokenizer = TwoViewTransform(32, 32, **settings), DVAETokenizer(dvae_checkpoint)
    reader, number = ShardReader(copied / "train"), 0
    for shard, entry in enumerate(reader.shards):
        records = np.load(folder / entry.name.replace(".tar", ".tokens.npy"))
        assert (records.shape, records.dtype) == ((entry.samples, 2), record_dtype(16))
        for row in range(entry.samples):
            for view in range(2):
                with open_image(reader.read(Sample(shard, row)).data) as image:
                    rng = generator(5, number + view * 2**40, CACHED_VIEW)
                    drawn = views.draw(image.size, rng)
                    arrays = views.apply(image, drawn)
                batch = {name: torch.from_numpy(array)[None] for name, array in arrays.items()}
                record = records[row, view]
                assert record["tokens"].tolist() == tokenizer.encode(jittered_views(batch)[1])[0].tolist()
                assert (record["crop"].tolist(), record["flip"]) == (list(drawn.crop), drawn.flip)
                assert np.array_equal(record["jitter_factors"], drawn.jitter.factors)
                assert np.array_equal(record["jitter_order"], drawn.jitter.order)
            number += 1
    assert TokenFolder(folder).tokenizer["sha256"] == tokenizer.digest()


def test_pretrain_from_cached_tokens(words, copied, run_cli, refused, tmp_path):
    assert run_cli(*words, f"data=[{copied / 'train'},{copied / 'val'}]")[0] == 0
    fit = ["fit", "+experiment=demo_pretrain", f"data.train={copied / 'train'}", *MODEL, f"run_dir={tmp_path / 'run'}"]
    train = f"data.tokens={copied / 'train/tokens'}"
    assert "data.val_tokens=FOLDER" in refused(*fit, f"data.val={copied / 'val'}", train, "tokenizer=none")
    held_out = [f"data.val={copied / 'val'}", f"data.val_tokens={copied / 'val/tokens'}"]
    code, _, stderr = run_cli(*fit, *held_out, train)
    assert code == 0, stderr
    assert "val/loss" in (tmp_path / "run/metrics.csv").read_text()
    assert not (tmp_path / "run/pictures").exists()
    code, stdout, stderr = run_cli("validate", f"run={tmp_path / 'run'}", "trainer.accelerator=cpu")
    assert code == 0, stderr
    assert "val/loss" in stdout
    code, stdout, _ = run_cli("visualize", f"run={tmp_path / 'run'}")
    assert (code, "attention.png" in stdout, "masked.png" in stdout) == (0, True, False)
    code, _, stderr = run_cli("visualize", "masked", f"run={tmp_path / 'run'}")
    assert (code, stderr) == (2, "error: the run has only cached tokens; drawing them needs a tokenizer\n")
    for none in ("tokenizer=none", "tokenizer=null"):
        code, stdout, stderr = run_cli(*fit, *held_out, train, none, "resume=never")
        assert code == 0, stderr


def test_tokenizer_must_match_cached_tokens(words, copied, dvae_checkpoint, run_cli, refused, tmp_path):
    assert run_cli(*words, f"data={copied / 'train'}")[0] == 0
    other = write_checkpoint(
        tmp_path / "other.ckpt", "tokenizer", DiscreteVAE(vocab_size=32, width=8, blocks=1, code_dim=8)
    )
    fit = ["fit", "+experiment=demo_pretrain", f"data.train={copied / 'train'}", f"data.val={copied / 'val'}", *MODEL]
    tokens = f"data.tokens={copied / 'train/tokens'}"
    assert "holds tokens of another tokenizer (DVAETokenizer, SHA-256" in refused(
        *fit, tokens, f"tokenizer.path={other}"
    )
    code, _, stderr = run_cli(*fit, tokens, f"tokenizer.path={dvae_checkpoint}", f"run_dir={tmp_path / 'run'}")
    assert code == 0, stderr
    assert list((tmp_path / "run/pictures").glob("*.png"))  # the tokenizer draws, and makes the held-out tokens
    last = f"init_from={tmp_path / 'run/checkpoints/last.ckpt'}"
    error = refused(*fit, f"tokenizer.path={other}", last, "model.size=null")
    assert "predicts the tokens of another tokenizer" in error
    assert "new_head=true" in error


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["views=2"], "views=1, not 2"),
        (["seed=1"], "seed=0, not 1"),
        (["flip=0"], "flip=0.5, not 0.0"),
        (["jitter=null"], "jitter=[0.4,0.4,0.4], not [0.0,0.0,0.0]"),
        (["image_size=64"], "grid=[4,4], not [8,8]"),
    ],
)
def test_existing_tokens_of_other_settings_are_kept(change, said, words, copied, run_cli, refused):
    words = [*words, f"data={copied / 'train'}"]
    assert run_cli(*words)[0] == 0
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    assert f"holds tokens with {said}; choose another out=" in refused(*words, *change)
    assert run_cli(*words)[0] == 0
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before
    assert not list(copied.rglob("*.making"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["data=nowhere"], "nowhere does not exist"),
        (["part=3/3"], "parts of 3 are 0/3 to 2/3"),
        (["part=3"], "part must be null or of the form 3/16"),
        (["part=1/0"], "parts of 0"),
        (["views=0"], "views must be a whole number of at least 1"),
        (["patch_size=7"], "image_size=32"),
        (["token_image_size=31"], "token_image_size=32"),
        (["channels=4", "tokenizer.path=nowhere.ckpt"], "nowhere.ckpt"),
        (["accelerator=tpu"], "accelerator must be one of auto, cpu, cuda"),
        (["data=https://127.0.0.1:9/x"], "out= must say where its tokens go"),
        (["data=[a,b]", "out=c"], "out= takes the tokens of one data set"),
        (["tokenizer=none"], "a tokenizer is needed"),
        (["out=/proc/nowhere"], "cannot write tokens to /proc/nowhere"),
    ],
)
def test_invalid_arguments(change, said, words, shards, refused):
    assert said in refused(*words, f"data={shards / 'train'}", *change)
    assert not list(shards.rglob("*.making"))


def test_out_must_be_empty(words, copied, refused):
    assert "exists and is not empty" in refused(*words, f"data={copied / 'train'}", f"out={copied / 'val'}")


def test_undecodable_images_are_named(words, copied, run_cli):
    spoil(copied / "train", 1, [0, 5])
    code, stdout, _ = run_cli(*words, f"data={copied / 'train'}")
    assert code == 0
    assert "2 images without" in stdout
    assert stdout.count("warning: ") == 2
    assert "shard-000001.tar cannot be decoded" in stdout
    records = np.load(copied / "train/tokens/shard-000001.tokens.npy")
    assert np.flatnonzero(records["crop"][:, 0, 2] == 0).tolist() == [0, 5]


def test_shard_with_other_checksum_is_refused(words, copied, run_cli):
    """Tokens carry the manifest's checksums, so each shard must match its own."""
    tar = copied / "train/shard-000001.tar"
    data = bytearray(tar.read_bytes())
    data[-1500] ^= 1  # the size is right, and the images decode
    tar.write_bytes(data)
    code, _, stderr = run_cli(*words, f"data={copied / 'train'}")
    assert code == 2
    assert "shard-000001.tar cannot be used: its content is not what its manifest says" in stderr.splitlines()[-1]
    assert not (copied / "train/tokens").exists()


def test_out_of_memory_writes_nothing(words, copied, refused, monkeypatch):
    def short(*args, **settings):
        raise MemoryError

    monkeypatch.setattr(tokenizing, "open_image", short)
    assert "error: not enough memory to decode 000000000 of " in refused(*words, f"data={copied / 'train'}")
    assert not (copied / "train/tokens").exists()


def test_remote_shards(words, shards, serve, run_cli, tmp_path):
    here = tmp_path / "tokens"
    remote = [f"data={serve(shards / 'train').url}", f"cache_dir={tmp_path / 'cache'}", "retries=0"]
    code, _, stderr = run_cli(*words, *remote, f"out={here}")
    assert code == 0, stderr
    code, _, stderr = run_cli(*words, f"data={shards / 'train'}", f"out={tmp_path / 'local'}")
    for file in here.iterdir():
        assert file.read_bytes() == (tmp_path / "local" / file.name).read_bytes()


def test_vocab_above_65536_is_refused(shards, tmp_path, words, refused):
    big = DiscreteVAE(vocab_size=2**16 + 1, width=8, blocks=1, code_dim=8)
    path = write_checkpoint(tmp_path / "big.ckpt", "tokenizer", big)
    assert "at most 65,536 can be stored" in refused(
        *words, f"tokenizer.path={path}", f"data={shards / 'train'}", f"out={tmp_path / 'out'}"
    )


def test_digest_depends_only_on_weights(openai_files, dvae_checkpoint, tmp_path):
    from beit_pretrain.tokenizers.tokenizer import OpenAITokenizer, weights_digest

    tokenizer = OpenAITokenizer(openai_files)
    digest = tokenizer.digest()
    weight = next(tokenizer.encoder.parameters())
    weight.view(-1)[0] += 1e-3
    assert tokenizer.digest() != digest
    weight.view(-1)[0] -= 1e-3
    renamed = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False))
    transposed = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False))
    for network in (renamed, transposed):
        torch.nn.init.ones_(network[0].weight)
    assert weights_digest(renamed) != weights_digest(transposed)
