"""Parquet of a data set on the Hub, against a small Hub on this machine."""

from __future__ import annotations

import hashlib
import json
import re
from urllib.parse import unquote

import huggingface_hub
import pytest
from loopback import Answer, Server, serving
from table_makers import NAMES, image_table, write
from test_tables import everything, opened, rows_of

from beit_pretrain.data import storage, table_folder, transports
from beit_pretrain.data.order import Sample
from beit_pretrain.data.settings import SourceSettings
from beit_pretrain.data.table_folder import open_tables
from beit_pretrain.errors import UserError

NAME = "hf://datasets/owner/name"
TOKEN = "hf_secret"


class Hub(Server):
    """One data set: its files are `tables`, by their paths. `asked` records what was asked."""

    private = False

    def __init__(self):
        super().__init__(etag=None)
        self.tables: dict[str, bytes] = {}

    def entry(self, path: str) -> dict:
        data = self.tables[path]
        about = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return {**about, "lfs": lfs} if path.endswith(".parquet") else about

    def answer(self, handler) -> None:
        path, token = unquote(handler.path.partition("?")[0]), handler.headers["Authorization"]
        if self.private and token != f"Bearer {TOKEN}":
            self.next = [Answer(status=401, headers={"X-Error-Code": "RepoNotFound"})]
        found = re.fullmatch(r"/api/datasets/owner/name(?:/revision/\w+)?(?:/(tree)/\w+/?(.*))?", path)
        self.files = {
            f"/datasets/owner/name/resolve/{v}/{n}": d for n, d in self.tables.items() for v in ("main", "v2")
        }
        if found and found[1]:
            below = f"{found[2]}/" if found[2] else ""
            listed = [self.entry(name) for name in sorted(self.tables) if name.startswith(below)]
            self.files[handler.path] = json.dumps(listed).encode()
        elif found:
            self.files[handler.path] = json.dumps({"id": "owner/name", "sha": "0" * 40}).encode()
        super().answer(handler)

    def paths(self) -> list[str]:
        """What was asked since the last call, without `/datasets/owner/name`."""
        asked, self.asked = self.asked, []
        paths = [path for path, *_ in asked if "owner/name" in path]  # the library asks for matters of its own, too
        return [re.sub(r"(/datasets/owner/name|\?.*)", "", path) for path in paths]


@pytest.fixture
def hub(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(storage, "LONGEST_PAUSE", 0.01)
    with serving(Hub()) as server:
        constants = huggingface_hub.constants
        address = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        transports._file_system.cache_clear()
        yield server
    transports._file_system.cache_clear()


@pytest.fixture
def published(hub, tmp_path):
    """Two files of train and one of test; returns their rows."""
    rows = {}
    for number, (name, count) in enumerate(
        {"train-00000-of-00002": 130, "train-00001-of-00002": 20, "test": 6}.items()
    ):
        table = image_table(count, 100 * number)
        hub.tables[f"data/{name}.parquet"] = write(tmp_path / f"{name}.parquet", table).read_bytes()
        rows[name] = rows_of(table)
    hub.tables["README.md"] = b"# A data set\n"
    return rows


@pytest.fixture
def cached(tmp_path):
    return lambda **settings: SourceSettings(cache_dir=str(tmp_path / "cache"), retries=1, **settings)


@pytest.mark.parametrize("ranges", [True, False])
def test_footers_first_then_a_file_when_it_is_needed(hub, published, cached, ranges, monkeypatch):
    monkeypatch.setattr(table_folder, "FOOTER", 1000)  # less than a footer has
    hub.ranges = ranges
    reader = opened(NAME, cached())
    assert (reader.sizes, reader.classes, reader.without_class) == ([130, 20], NAMES, 0)
    ranged = [asked for asked in hub.asked if asked[1]]
    assert len(ranged) == 4  # of each file its end, and then the whole footer
    files = [f"/resolve/main/data/train-0000{n}-of-00002.parquet" for n in (0, 0, 1, 1)]
    assert sorted(hub.paths()) == sorted(["/api", "/api/tree/main", "/resolve/main/README.md", *files])
    assert [shard.spare for shard in reader.shards] == [
        len(hub.tables[f"data/train-0000{n}-of-00002.parquet"]) for n in (0, 1)
    ]
    reader.fetch_ahead(1)
    assert hub.paths() == [files[2]]
    assert everything(reader) == published["train-00000-of-00002"] + published["train-00001-of-00002"]
    assert hub.paths() == [files[0]]
    assert reader.where(1) == f"{NAME}/data/train-00001-of-00002.parquet"
    opened(NAME, cached())
    assert hub.paths() == ["/api/tree/main", "/resolve/main/README.md"]  # the footers are noted


def test_parts_folders_files_and_revisions(hub, published, cached):
    for address, split, rows in (
        (f"{NAME}?split=test", None, "test"),
        (f"{NAME}@v2/data", "val", "test"),
        (f"{NAME}/data/train-00001-of-00002.parquet", None, "train-00001-of-00002"),
    ):
        assert everything(opened(address, cached(), split)) == published[rows], address
    with pytest.raises(UserError, match=f"{NAME} has the parts test, train; split=extra is none of them"):
        open_tables(f"{NAME}?split=extra&token=x", cached())


def test_the_header_of_the_readme_says_the_files(hub, published, cached):
    head = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: data/test*
  - split: test
    path: [data/train-00001*]
---
# A data set
"""
    hub.tables["README.md"] = head.encode()
    assert opened(NAME, cached()).sizes == [6]
    assert opened(NAME, cached(), "val").sizes == [20]
    hub.tables["README.md"] = head.replace("default", "one").encode() + b"\n"
    assert opened(NAME, cached()).sizes == [6]
    two = head.replace("default", "one").replace("---\n#", "- config_name: two\n  data_files: data/*\n---\n#")
    hub.tables["README.md"] = two.encode()
    with pytest.raises(UserError, match=f"{NAME} has the subsets one, two; add the folder of one to the address"):
        open_tables(NAME, cached())
    hub.tables["README.md"] = b"---\nconfigs: 3\n---\n"
    assert opened(NAME, cached()).sizes == [130, 20]


def test_repositories_of_something_else_are_not_tables(hub, cached):
    hub.tables = {"train/00000.tar": b"", "train/00000.parquet": b"", "README.md": b""}
    assert open_tables(NAME, cached()) is None
    assert open_tables("hf://owner/name", cached()) is None
    assert open_tables("https://host/train.parquet", cached()) is None


def test_broken_and_changed_downloads(hub, published, cached):
    reader = opened(NAME, cached())
    hub.next = [Answer(cut=5000)]
    assert len(everything(reader)) == 150
    reader = opened(f"{NAME}?split=test", cached())
    data = hub.tables["data/test.parquet"]
    hub.tables["data/test.parquet"] = data[:500] + b"!" + data[501:]
    with pytest.raises(UserError, match=r"data/test\.parquet of .* cannot be fetched .*another SHA-256"):
        everything(reader)
    hub.tables["data/test.parquet"] = data[:-300]
    with pytest.raises(UserError, match=r"data/test\.parquet cannot be read as parquet"):
        opened(f"{NAME}?split=test", cached())


def test_private_gone_and_offline_are_one_line(hub, published, cached, monkeypatch):
    hub.private = True
    with pytest.raises(UserError, match=f"{NAME} cannot be listed: ") as caught:
        open_tables(f"{NAME}?token=secret", cached())
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    hub.next = []
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    transports._file_system.cache_clear()
    assert opened(NAME, cached()).sizes == [130, 20]
    with pytest.raises(UserError, match="hf://datasets/owner/none cannot be listed: "):
        open_tables("hf://datasets/owner/none", cached())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    transports._file_system.cache_clear()
    with pytest.raises(UserError, match=r"cannot be listed: .*HF_HUB_OFFLINE"):
        open_tables(f"{NAME}?split=test", cached())
    hub.paths()
    assert opened(NAME, cached()).sizes == [130, 20]  # as it was listed the last time
    assert hub.paths() == []


def test_listing_is_retried_and_an_unreachable_hub_is_one_line(hub, published, cached, monkeypatch):
    hub.next = [Answer(status=503)]
    assert opened(NAME, cached()).sizes == [130, 20]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    transports._file_system.cache_clear()
    with pytest.raises(UserError, match=r"cannot be listed \(2 tries\): ConnectError") as caught:
        open_tables(f"{NAME}?split=test", cached())
    assert "\n" not in str(caught.value)


def test_texts_as_classes_need_their_names(hub, tmp_path, cached, capsys):
    for number in range(2):
        table = image_table(4, labels=[*"dcba"[number:], *"a" * number], names=None)
        hub.tables[f"{number}.parquet"] = write(tmp_path / "a.parquet", table).read_bytes()
    reader = opened(NAME, cached())
    assert (reader.classes, reader.read(Sample(0, 0)).label) == ([], -1)
    assert "is read without classes: the classes are texts in the column label" in capsys.readouterr().err
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\n")
    reader = opened(NAME, cached(classes=str(tmp_path / "names.txt")))
    assert [reader.read(Sample(1, row)).label for row in range(4)] == [2, 1, 0, 0]
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    reader = opened(NAME, cached(classes=str(tmp_path / "names.txt")))
    with pytest.raises(UserError, match=r"0\.parquet has the class 'd', which classes= does not name"):
        reader.read(Sample(0, 0))
