"""`beit_pretrain.fit` and `compose`: the command line's run, values as they are, interruptions."""

from __future__ import annotations

import copy
import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning import Callback, LightningDataModule, LightningModule
from tiny import COMMON, TASKS, fit_words, refusal, same_run, state_of

import beit_pretrain
from beit_pretrain.config import compose_raw, validated
from beit_pretrain.engine import training
from beit_pretrain.engine.keywords import fit_settings, full_name, place
from beit_pretrain.engine.preemption import SIGNALS
from beit_pretrain.tasks.pretrain import PretrainSettings

SMALL = [*COMMON.split(), *TASKS["pretrain"].split(), "batch_size=4", "steps=4", "val_every=2", "save_every=2"]


@pytest.fixture
def given_settings(shards, dvae_checkpoint, tmp_path):
    """Keywords of the tiny run."""
    data = {"train": shards / "train", "val": str(shards / "val")}
    return {"data": data, "tokenizer_path": dvae_checkpoint, "run_dir": tmp_path / "python"}


def interrupt_at(step: int, how: int = signal.SIGINT) -> Callback:
    """A callback that sends this process a signal in the step after `step`."""

    class Interrupt(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == step and batch_idx % 2 == 0:  # its first micro-batch
                os.kill(os.getpid(), how)

    return Interrupt()


def test_same_run_as_the_command_line(given_settings, shards, dvae_checkpoint, run_cli, tmp_path, capsys):
    words = [*fit_words("pretrain", shards, f"tokenizer.path={dvae_checkpoint}"), *SMALL]
    assert run_cli(*words, f"run_dir={tmp_path / 'words'}")[0] == 0
    done = beit_pretrain.fit("demo_pretrain", SMALL, **given_settings)
    assert same_run(tmp_path / "words", tmp_path / "python") == 4
    assert done.metrics["step"] == 4
    assert {"val/loss", "train/loss"} <= done.metrics.keys()
    torch.rand(7)  # what the notebook draws in between changes nothing
    module, data, trainer = beit_pretrain.compose("demo_pretrain", SMALL, **given_settings | {"run_dir": "by hand"})
    torch.rand(7)
    assert (isinstance(module, LightningModule), isinstance(data, LightningDataModule)) == (True, True)
    trainer.fit(module, datamodule=data, ckpt_path=None)
    [metrics] = trainer.validate(module, data, verbose=False)
    assert metrics["val/loss"] == pytest.approx(done.metrics["val/loss"], rel=1e-6)
    assert same_run(tmp_path / "words", tmp_path / "by hand") == 4
    assert "can resume" not in capsys.readouterr().err


def test_values_by_keyword():
    cfg = fit_settings(
        "demo_pretrain",
        ["optim.lr=1e-3", "logger=wandb"],
        {
            "data_train": [Path("a"), "b"],
            "optim": {"weight_decay": np.float32(0.5), "betas": (0.8, np.float64(0.9))},
            "optim_warmup_steps": np.int64(3),
            "optim.lr": 2e-3,
            "global_batch_size": 32,
            "tokenizer": None,
            "logger_mode": "offline",
            "model_embed_dim": 48,
            "trainer_max_time": "00:01:00:00",
            "trainer": {"accelerator": "cpu"},
            "knn": {"k": 3},
            "recipe": None,
            "name": 7,
            "data_tokens": "x",
            "data_scale": torch.tensor([0.5, 1.0]),
        },
    )
    assert cfg.data.train == ["a", "b"]
    assert (cfg.optim.lr, cfg.optim.weight_decay, cfg.optim.warmup_steps) == (2e-3, 0.5, 3)
    assert (cfg.optim.betas, cfg.data.scale) == ([0.8, 0.9], [0.5, 1.0])
    assert (cfg.batch_size, cfg.tokenizer.path, cfg.logger.wandb.mode) == (32, None, "offline")
    assert (cfg.model.embed_dim, cfg.trainer.max_time, cfg.trainer.accelerator) == (48, "00:01:00:00", "cpu")
    assert (cfg.knn.k, cfg.recipe, cfg.name, cfg.run_dir) == (3, None, "7", "runs/7")


@pytest.mark.parametrize("named", [{"logger_mode": "offline"}, {"logger.mode": "offline"}])
def test_loggers_of_earlier_names(named):
    common = {"data_train": "x", "tokenizer_path": "y"}
    cfg = fit_settings("demo_pretrain", [], {"logger_kind": "wandb", **named, **common})
    assert cfg.logger.wandb.mode == "offline"
    cfg = fit_settings("demo_pretrain", [], {"logger": {"wandb": {"mode": "offline"}}, **common})  # names its logger
    assert cfg.logger.wandb.mode == "offline"
    assert fit_settings("demo_pretrain", ["~logger"], {"logger_csv": True, **common}).logger.csv


@pytest.fixture(scope="module")
def raw():
    return compose_raw("fit", ["+experiment=demo_pretrain"])


@given(
    text=st.text(
        st.characters(codec="utf-8", exclude_characters="\0") | st.sampled_from("\\$${}'\"=,[]: \n#~"), min_size=1
    )
)
def test_texts_arrive_as_they_are(raw, text):
    if text == "???" or text.startswith("~"):  # a missing value; a home folder
        return
    cfg = copy.deepcopy(raw)
    place(cfg, PretrainSettings, {"data": {"train": [text, text]}, "run_dir": text, "tokenizer_path": "x"})
    cfg = validated(cfg, "fit")
    assert (cfg.data.train, cfg.run_dir) == ([text, text], text)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("batch_size", "batch_size"),
        ("global_batch_size", "global_batch_size"),
        ("data_val_images", "data.val_images"),
        ("optim_min_lr", "optim.min_lr"),
        ("mask_max_patches", "mask.max_patches"),
        ("data.train", "data.train"),
        ("trainer_limit_val_batches", "trainer.limit_val_batches"),
        ("tokenizer_path", "tokenizer.path"),
        ("data", "data"),
    ],
)
def test_names_of_keywords(name, expected):
    assert full_name(name, PretrainSettings) == expected


@pytest.mark.parametrize(
    ("experiment", "words", "named", "expected"),
    [
        ("smal_own", [], {}, "unknown experiment 'smal_own'; did you mean small_own? there are "),
        ("../fit", [], {}, "unknown experiment '../fit'"),
        (None, [], {}, "choose what to train: +experiment=NAME"),
        ("small_own", [], {}, "data.train is missing: shards of training images"),
        ("small_own", ["optim.lrr=1"], {}, "unknown key 'optim.lrr' for fit; did you mean optim.lr?"),
        ("small_own", ["optim.lr"], {}, "settings are given as key=value, not 'optim.lr'"),
        ("small_own", "optim.lr=fast", {"data_train": "x", "tokenizer_path": "y"}, "optim.lr must be a number"),
        ("small_own", [1], {}, "overrides are texts such as 'optim.lr=1e-3', not 1"),
        ("small_own", ["hydra.run.dir=x"], {}, "hydra.run.dir=x is for sweeps"),
        ("small_own", [], {"data_trian": "x"}, "unknown key 'data.trian' for fit; did you mean data.train?"),
        ("small_own", [], {"lr": 1}, "unknown key 'lr' for fit; did you mean optim.lr?"),
        ("small_own", [], {"data_workers": 1}, "data.workers was renamed to data.num_workers"),
        ("small_own", [], {"optim": {"lrr": 1}}, "unknown key 'optim.lrr'; did you mean optim.lr?"),
        ("small_own", [], {"optim_lr": 1, "optim": {"lr": 2}}, "optim.lr is given twice"),
        (
            "small_own",
            [],
            {"optim_lr": object()},
            "optim.lr takes None, a number, a text, a path or a list of them, not",
        ),
        ("small_own", [], {"steps": {"a": 1}}, "steps must be null or a whole number"),
        ("small_own", [], {"optim_lr": "1e-3"}, "optim.lr must be a number above 0, got '1e-3'"),
        ("small_own", [], {"data": "photos", "tokenizer_path": "y"}, "data is a group of settings"),
        ("small_own", [], {"logger": "paper"}, "logger='paper': choose one of csv, tensorboard, wandb"),
        ("small_own", [], {"logger_wandb_mode": "offline"}, "logger.wandb.mode needs logger=wandb, or logger=[...]"),
        ("small_own", [], {"logger_tensorboard": {"flush_secs": 3}}, "logger.tensorboard needs logger=tensorboard"),
        ("small_own", [], {"logger.foo.bar": 1}, "unknown key 'logger.foo'"),
        ("small_own", [], {"logger": "wandb", "logger_kind": "csv"}, "logger is given twice"),
        ("small_own", 3, {}, "overrides are a list of texts"),
        ("small_own", [], {"tokenizer": "own.ckpt"}, "Could not find 'tokenizer/own.ckpt'"),
    ],
)
def test_wrong_settings_give_one_line(experiment, words, named, expected):
    complete = {"data_train": "x", "tokenizer_path": "y"} if named and "data" not in named else {}
    complete = {} if "tokenizer" in named else complete
    assert expected in refusal(fit_settings, experiment, words, {**complete, **named})


def test_interrupted_run_resumes(given_settings, tmp_path):
    given_settings |= {"overrides": SMALL}
    beit_pretrain.fit("demo_pretrain", **given_settings)
    before = [signal.getsignal(signum) for signum in SIGNALS]
    stopping = {**given_settings, "run_dir": tmp_path / "stopped", "resume": "never"}
    run = beit_pretrain.compose("demo_pretrain", **stopping, callbacks=interrupt_at(1))
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    assert torch.load(tmp_path / "stopped/checkpoints/last.ckpt")["global_step"] == 2
    with pytest.raises(SystemExit, match="75"):
        beit_pretrain.fit("demo_pretrain", **stopping | {"resume": "auto"}, callbacks=[interrupt_at(2, signal.SIGTERM)])
    assert [signal.getsignal(signum) for signum in SIGNALS] == before
    assert torch.load(tmp_path / "stopped/checkpoints/last.ckpt")["global_step"] == 3
    old = run.trainer
    assert run.fit().metrics["step"] == 4
    assert run.trainer is not old
    assert same_run(tmp_path / "python", tmp_path / "stopped") == 4


@pytest.mark.long
def test_finished_run_gives_its_metrics_and_weights(given_settings, tmp_path, capsys):
    first = beit_pretrain.fit("demo_pretrain", SMALL, **given_settings)
    again = beit_pretrain.fit("demo_pretrain", SMALL, **given_settings)
    assert "already finished" in capsys.readouterr().out
    assert again.metrics == first.metrics
    saved = state_of(tmp_path / "python")
    for name, tensor in again.module.model.state_dict().items():
        assert torch.equal(tensor, saved[f"model.{name}"])
    assert again.fit().metrics == first.metrics


@pytest.mark.long
def test_process_is_as_before(given_settings, tmp_path):
    """Threads, determinism and Hydra belong to the notebook; another thread may train."""
    from hydra import compose, initialize_config_dir

    torch.set_num_threads(2)
    words = [*SMALL, "steps=1", "val_every=1"]
    with initialize_config_dir(str(Path(__file__).parent / "golden"), version_base="1.3"):
        beit_pretrain.fit("demo_pretrain", words, **given_settings, threads=1, deterministic=True, compile=False)
        assert compose(overrides=["+a=1"]) == {"a": 1}  # the notebook's own
    assert torch.get_num_threads() == 2
    assert not torch.are_deterministic_algorithms_enabled()
    found: list = []
    other = {**given_settings, "run_dir": tmp_path / "thread", "data_num_workers": 1}
    thread = threading.Thread(target=lambda: found.append(beit_pretrain.fit("demo_pretrain", words, **other)))
    thread.start()
    thread.join()
    assert found[0].metrics["step"] == 1
    same_run(tmp_path / "python", tmp_path / "thread")


def test_other_parts_are_refused(given_settings):
    module, data, trainer = run = beit_pretrain.compose("demo_pretrain", SMALL, **given_settings)
    for parts in ((module,), (module, data.train_dataset(None)), (torch.nn.Linear(1, 1), data), (data, module)):
        assert "trainer.fit(module, data)" in refusal(trainer.fit, *parts)
    assert not (run.settings.folder).exists()
    assert "callbacks are objects" in refusal(
        beit_pretrain.fit, "demo_pretrain", SMALL, callbacks=[3], **given_settings
    )


def test_notebook_cannot_start_processes(given_settings, monkeypatch):
    two = [*SMALL, "trainer.devices=2", "trainer.accelerator=cpu"]
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    assert "means 2 processes" in refusal(beit_pretrain.compose, "demo_pretrain", two, **given_settings)
    monkeypatch.delattr(sys, "ps1")
    for file, interactive in ((__file__, False), ("<stdin>", True), (None, True)):
        monkeypatch.setattr(sys.modules["__main__"], "__file__", file, raising=False)
        assert training.is_interactive() == interactive
