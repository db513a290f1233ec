"""Kills of a streamed run at any moment, with other loader processes at every start: no image is lost or doubled."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from stream_watcher import Seen, due, used
from test_stream import jpeg, write_tar
from tiny import DVAE, last_checkpoint, seeded, steps_written, write_checkpoint

pytestmark = [pytest.mark.soak, pytest.mark.long, pytest.mark.timeout(600)]

KILLS, STEPS, SIZES = 30, 400, (40, 7, 61, 22, 35, 3, 12)
WORDS = (
    "fit +experiment=demo_pretrain image_size=32 patch_size=8 mask.max_patches=6 mask.min_block=1 global_batch_size=8 "
    "batch_size=4 model.embed_dim=32 model.num_heads=2 model.depth=2 log_every=1 threads=1 trainer.accelerator=cpu "
    "data.order=stream data.shuffle_buffer=24 data.classes=180 save_every=3 resume=auto name=killed"
).split()


def life(folder: Path, words: list[str]) -> None:
    """One start of `fit`, in a process forked from one that has imported everything."""
    os.setsid()
    os.chdir(folder)
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from beit_pretrain import cli
    from beit_pretrain.engine import fit

    make = fit.make_trainer
    fit.make_trainer = lambda cfg, steps, callbacks: make(cfg, steps, [*callbacks, Seen()])
    os.environ["SEEN"] = str(folder / "seen")
    sys.argv = ["beit_pretrain", *words]
    code = cli.main()
    sys.stdout.flush()
    os._exit(code)


def test_thirty_kills_of_a_streamed_run(tmp_path, measured):
    """30 SIGKILLs of a streamed run, with 0 to 3 loader processes: each image is used exactly as often as is due."""
    from beit_pretrain.tokenizers.dvae import DiscreteVAE

    tars, number = [], 0
    for tar, size in enumerate(SIZES):
        tars.append(list(range(number, number + size)))
        members = [(f"{n}.{e}", jpeg(n) if e == "jpg" else b"%d" % n) for n in tars[-1] for e in ("jpg", "cls")]
        write_tar(tmp_path / f"tars/{tar}.tar", members)
        number += size
    tokenizer = write_checkpoint(tmp_path / "dvae.ckpt", "tokenizer", seeded(DiscreteVAE, **DVAE))
    words = [*WORDS, f"data.train={tmp_path / 'tars'}", f"tokenizer.path={tokenizer}", f"steps={STEPS}"]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["beit_pretrain.cli", "beit_pretrain.tasks.pretrain", "beit_pretrain.engine.fit"])
    run, record, rng, lives, begun = tmp_path / "runs/killed", tmp_path / "seen", random.Random(0), [], time.monotonic()
    for kill in range(KILLS + 1):
        saved = (run / "checkpoints/last.ckpt").exists() and last_checkpoint(run)["global_step"]
        with record.open("a") as file:
            file.write("--- start\n")
        lives.append(int(saved))
        before = steps_written(run)
        process = context.Process(target=life, args=(tmp_path, [*words, f"data.num_workers={rng.randrange(4)}"]))
        process.start()
        if kill == KILLS:
            process.join(120)
            assert process.exitcode == 0, (tmp_path / "log").read_text()[-2000:]
            break
        aim, deadline = before + rng.randrange(1, 12), time.monotonic() + 60
        while steps_written(run) < aim and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        assert process.is_alive(), (tmp_path / "log").read_text()[-2000:]
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    content = last_checkpoint(run)
    assert content["global_step"] == STEPS
    seen, expected = used(record, lives), due(content["PretrainData"]["stream"], tars, content["settings"]["seed"])
    twice, missed = (seen - expected).total(), (expected - seen).total()
    assert (twice, missed) == (0, 0)
    assert seen.total() == 8 * STEPS
    measured(f"{KILLS} kills, 0 to 3 loader processes: of {seen.total():,} images {twice} twice, {missed} missed")
    measured(f"{time.monotonic() - begun:.0f} s; {min(seen.values())} to {max(seen.values())} times each image")
