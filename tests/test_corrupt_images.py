"""Runs with bad images and failing servers: they list what they replaced, or stop with one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import fit_words, spoil

from beit_pretrain.data import storage
from beit_pretrain.data.corrupt_images import CorruptImages, allowed, truncate_after
from beit_pretrain.errors import UserError
from beit_pretrain.tables import curve

MORE = [
    "data.val=null",
    "num_visualizations=0",
    "model.depth=1",
    "log_every=2",
    "data.shuffle_block_size=12",
    "data.shuffle_streams=2",
]


@pytest.fixture
def folder(shards, tmp_path) -> Path:
    return shutil.copytree(shards / "train", tmp_path / "train")


@pytest.fixture
def fit(run_cli, dvae_checkpoint, tmp_path):
    """A tiny pre-training run: `fit(source, *words)` gives (exit code, stderr)."""

    def run(train, *words: str, steps: int = 12) -> tuple[int, str]:
        given = [f"data.train={train}", f"tokenizer.path={dvae_checkpoint}", f"data.cache_dir={tmp_path / 'cache'}"]
        where = [f"run_dir={tmp_path / 'run'}", f"steps={steps}", f"val_every={steps}"]
        code, _, stderr = run_cli(*fit_words("pretrain", tmp_path, *MORE, *given, *where, *words))
        return code, stderr

    return run


def listed(tmp_path: Path) -> list[dict]:
    path = tmp_path / "run/replaced.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def errors(stderr: str) -> list[str]:
    assert "Traceback" not in stderr
    return [line for line in stderr.splitlines() if line.startswith("error:")]


class TestBadImages:
    @pytest.mark.parametrize(("num_workers", "batch_size"), [(0, 8), (2, 2)])
    def test_run_lists_replaced_images(self, folder, fit, tmp_path, num_workers, batch_size):
        spoil(folder, 1, [4])
        code, stderr = fit(
            folder, "data.max_corrupt_fraction=.05", f"data.num_workers={num_workers}", f"batch_size={batch_size}"
        )
        assert code == 0, stderr
        records = listed(tmp_path)
        assert [set(r) for r in records] == [
            {"step", "split", "position", "shard", "key", "reason", "replaced_by"}
        ] * len(records)
        assert {(r["shard"], r["split"]) for r in records} == {(f"{folder}/shard-000001.tar", "train")}
        assert len({r["key"] for r in records}) == 1
        assert len(records) == 2  # two epochs of 47 or 48 images, one of them bad
        assert [r["position"] // 8 for r in records] == [r["step"] - 1 for r in records]
        warnings = [line for line in stderr.splitlines() if "warning: 1 image could not be decoded" in line]
        assert len(warnings) == 2
        assert "replaced.jsonl" in warnings[0]
        _, shares = curve(tmp_path / "run/metrics.csv", "train/replaced")
        assert sum(shares) * 16 == pytest.approx(len(records))

    def test_too_many_bad_images_stop_run(self, folder, fit, tmp_path):
        for shard in range(4):
            spoil(folder, shard, [1, 6])
        code, stderr = fit(folder)
        assert code == 2
        (line,) = errors(stderr)
        assert "training images had to be replaced, more than data.max_corrupt_fraction=0.001 allows" in line
        assert "shard-0000" in line
        assert len(listed(tmp_path)) > 3
        assert fit(folder, "data.max_corrupt_fraction=.5", "resume=never")[0] == 0
        assert {r["step"] for r in listed(tmp_path)} <= set(range(1, 13))

    def test_max_bad_0_stops_at_first_bad_image(self, folder, fit):
        spoil(folder, 1, [4])
        code, stderr = fit(folder, "data.max_corrupt_fraction=0")
        assert code == 2
        assert "1 of" in errors(stderr)[0]

    def test_bad_validation_images_are_listed_once(self, folder, shards, fit, tmp_path):
        spoil(folder, 0, [2])
        words = [f"data.val={folder}", "data.val_images=12", "val_every=2", "knn.bank=4", "knn.queries=2"]
        code, stderr = fit(shards / "train", *words)
        assert code == 0, stderr
        assert [(r["split"], r["position"], r["step"]) for r in listed(tmp_path)] == [("val", 2, 2)]

    def test_resume_truncates_list(self, tmp_path):
        path = tmp_path / "replaced.jsonl"
        path.write_text("".join(json.dumps({"step": s}) + "\n" for s in (1, 2, 3)) + '{"step": 2')
        truncate_after(path, 2)
        assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
        truncate_after(tmp_path / "none", 2)
        assert not (tmp_path / "none").exists()

    def test_damaged_lines_are_dropped(self, tmp_path, capsys):
        path, good = tmp_path / "replaced.jsonl", b'{"step": 1}\n'
        for line in (b"\0\0", b"\xff", b'{"step": ', b"[1]", b'{"step": "x"}', b"7", b'{"stop": 1}', b""):
            path.write_bytes(good + line + b"\n" + good + b'{"step": 3}\n')
            truncate_after(path, 2)
            assert path.read_bytes() == 2 * good, line
            assert capsys.readouterr().err == f"warning: {path}: a damaged line is left out from here on\n"

    @pytest.mark.parametrize(
        ("share", "images", "bad"), [(0.001, 8, 3), (0.001, 1000, 8), (0.001, 10**6, 1129), (0, 10**6, 0)]
    )
    def test_allowed_count(self, share, images, bad):
        assert int(allowed(share, images)) == bad

    def test_rate_is_counted_per_million_images(self, tmp_path):
        """Few bad images at the beginning do not excuse many at the end."""
        calls = CorruptImages(tmp_path / "list", 0.001)
        module = SimpleNamespace(
            device="cpu", log_every=1, accumulate=lambda *a, **k: None, sum_over_processes=lambda x: x
        )
        trainer = SimpleNamespace(
            global_step=0, max_steps=10**9, accumulate_grad_batches=1, world_size=1, is_global_zero=True
        )
        record = {"shard": "s", "key": "k", "reason": "r", "replaced_by": "n"}

        def step(bad: int, images: int = 250_000) -> None:
            trainer.global_step += 1
            batch = {"position": range(images), "bad": [{"position": k, **record} for k in range(bad)]}
            calls.on_train_batch_end(trainer, module, None, batch, 0)

        for _ in range(40):
            step(240)
        with pytest.raises(UserError, match="400 of 250,000"):
            step(400)
        assert len((tmp_path / "list").read_text().splitlines()) == 40 * 240 + 400

    def test_consecutive_bad_images_count_once(self, folder, fit, tmp_path):
        spoil(folder, 1, [4, 5, 6])
        code, stderr = fit(folder, "data.max_corrupt_fraction=.2")
        assert code == 0, stderr
        shares = curve(tmp_path / "run/metrics.csv", "train/replaced")[1]
        assert sum(shares) * 16 == pytest.approx(len({r["position"] for r in listed(tmp_path)}))
        assert len(listed(tmp_path)) == 2 * (3 + 2 + 1)

    @pytest.mark.long
    def test_two_processes_list_the_same(self, folder, serve, dvae_checkpoint, tmp_path):
        """From a server through a shared cache; rank 0 writes the list of all processes."""
        spoil(folder, 1, [4])
        spoil(folder, 3, [0, 7])
        server = serve(folder)
        lists = []
        for devices in (1, 2):
            words = fit_words("pretrain", tmp_path, *MORE, f"data.train={server.url}", "data.num_workers=1")
            words += [f"tokenizer.path={dvae_checkpoint}", f"data.cache_dir={tmp_path / str(devices)}", "steps=12"]
            words += [
                f"run_dir={tmp_path / f'run{devices}'}",
                "data.max_corrupt_fraction=.2",
                f"trainer.devices={devices}",
            ]
            words += ["trainer.accelerator=cpu", "resume=never", *["trainer.strategy=ddp"] * (devices - 1)]
            server.requests.clear()
            subprocess.run([sys.executable, "-m", "beit_pretrain", *words], check=True, timeout=200)
            path = tmp_path / f"run{devices}"
            lists.append((path / "replaced.jsonl").read_text())
            assert {count for name, count in server.requests.items() if "shard" in name} == {1}
            shares = curve(path / "metrics.csv", "train/replaced")[1]
            assert sum(shares) * 16 == pytest.approx(len(lists[-1].splitlines()))
        assert lists[0] == lists[1]


class TestServers:
    """The real command against failing servers, with shortened pauses."""

    @pytest.fixture(autouse=True)
    def no_pauses(self, monkeypatch):
        monkeypatch.setattr(storage, "LONGEST_PAUSE", 0.01)

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_run_survives_transient_errors(self, shards, serve, fit, tmp_path, num_workers):
        server, troubles = serve(shards / "train"), ["half", 503, "stall", "drop", "flip"]
        server.trouble = lambda name, number: troubles[sum(map(ord, name)) % 5] if number == 0 else None
        code, stderr = fit(server.url, f"data.num_workers={num_workers}", "data.timeout=.5")
        assert code == 0, stderr
        losses = curve(tmp_path / "run/metrics.csv", "train/loss")
        assert fit(shards / "train", "resume=never")[0] == 0
        assert curve(tmp_path / "run/metrics.csv", "train/loss") == losses

    @pytest.mark.parametrize(("trouble", "said"), [("stall", "stalled"), (503, "HTTP 503"), ("half", "broke off")])
    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_permanent_error_stops_run_and_names_shard(self, shards, serve, fit, tmp_path, trouble, said, num_workers):
        server = serve(shards / "train")
        server.trouble = lambda name, number: trouble if name == "shard-000002.tar" else None
        server.ranges = False
        code, stderr = fit(server.url, "data.retries=1", "data.timeout=.3", f"data.num_workers={num_workers}")
        assert code == 2
        (line,) = errors(stderr)
        assert f"shard-000002.tar of {server.url} cannot be fetched" in line
        assert said in line
        assert not list((tmp_path / "cache").glob("*.partial"))

    def test_cache_respects_limit(self, shards, serve, fit, tmp_path):
        """Room for two of four shards: every epoch fetches the evicted ones again."""
        server = serve(shards / "train")
        largest = max(path.stat().st_size for path in (shards / "train").glob("*.tar"))
        limit, most = 2 * (largest + 1000), 0

        def watch(name, number):
            nonlocal most
            if (tmp_path / "cache").is_dir():
                most = max(most, sum(p.stat().st_size for p in (tmp_path / "cache").iterdir() if p.exists()))

        server.trouble = watch
        code, stderr = fit(
            server.url, f"data.cache_gb={limit / 1e9}", "data.shuffle_streams=1", "data.shuffle_block_size=2", steps=18
        )
        assert code == 0, stderr
        assert 0 < most <= limit
        assert sum(p.stat().st_size for p in (tmp_path / "cache").iterdir()) <= limit
        assert sum(server.requests.values()) > 6
        code, stderr = fit(server.url, "data.cache_gb=1e-5", "resume=never")
        assert code == 2
        assert "data.cache_gb" in errors(stderr)[0]

    @pytest.mark.parametrize(
        ("location", "said"),
        [
            ("http://127.0.0.1:9/x", "refused"),
            ("ftp://host/x", "not ftp"),
            ("pipe:cat x", "exit code 1"),
            ("pipe:exit 3; {name}", "exit code 3"),
            ("http://[x", "Invalid IPv6"),
        ],
    )
    def test_unreachable_locations(self, fit, tmp_path, location, said):
        code, stderr = fit(location, "data.retries=1")
        assert code == 2
        (line,) = errors(stderr)
        assert said in line
        assert not (tmp_path / "run").exists()


def test_mixture_trains_and_resumes(shards, fit, tmp_path):
    both = f"[{shards / 'train'},{shards / 'val'}]"
    code, stderr = fit(both, "data.weights=[.7,.3]", steps=4)
    assert code == 0, stderr
    code, stderr = fit(both, "data.weights=[.6,.4]", steps=4)
    assert "data.weights" in errors(stderr)[0]
    for words, said in (
        (["data.weights=[1]"], "data.weights has 1 numbers for 2"),
        (["data.weights=[1,0]"], "data.weights must be"),
        (["data.weights=[1,1]", "data.labels_per_class=2"], "exclude each other"),
    ):
        code, stderr = fit(both, "resume=never", *words)
        assert code == 2
        assert said in errors(stderr)[0]
