"""Models of the Hub, from a small Hub on this machine: fetched once, read by every reader, refused in one line."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub
import pytest
import torch
from foreign import hf_classifier
from loopback import Answer, Server, serving
from tiny import refusal

from beit_pretrain.models.checkpoints.hub import local_copy
from beit_pretrain.models.checkpoints.pretrained import load_pretrained

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


class Hub(Server):
    """The model owner/name with the files `stored`, at two revisions."""

    def __init__(self):
        super().__init__(etag=None, head=True)
        self.stored: dict[str, bytes] = {}
        self.gated = False

    def answer(self, handler) -> None:
        path = unquote(handler.path.partition("?")[0])
        found = re.fullmatch(r"(?:/api/models)?/owner/name(?:/(revision|tree|resolve)/(\w+)/?(.*))?", path)
        self.files = {}
        if not found:
            self.next = [Answer(status=401, headers={"X-Error-Code": "RepoNotFound"})]
        elif (revision := found[2] or "main") not in (*COMMITS, *COMMITS.values()):
            self.next = [Answer(status=404, headers={"X-Error-Code": "RevisionNotFound"})]
        elif found[1] == "resolve" and self.gated:
            self.next = [Answer(status=403, headers={"X-Error-Code": "GatedRepo"})]
        elif found[1] == "resolve" and found[3] in self.stored:
            data = self.stored[found[3]]
            headers = {"X-Repo-Commit": COMMITS.get(revision, revision), "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
            self.files, self.next = {path: data}, [Answer(headers=headers)]
        elif found[1] == "tree":
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.stored.items()
            ]
            self.files = {path: json.dumps(entries).encode()}
        elif found[1] != "resolve":
            self.files = {path: json.dumps({"id": "owner/name", "sha": COMMITS[revision]}).encode()}
        super().answer(handler)

    def fetched(self) -> set[str]:
        """The files that were asked for since the last call."""
        asked, self.asked = self.asked, []
        return {path.rpartition("/")[2] for path, *_ in asked if "/resolve/" in path}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    constants = huggingface_hub.constants
    with serving(Hub()) as server:
        address = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.chdir(tmp_path)
        yield server


@pytest.fixture
def published(hub, tmp_path):
    """A classifier of transformers as a repository, with files that nobody needs."""
    model = hf_classifier()
    model.save_pretrained(tmp_path / "theirs")
    hub.stored = {file.name: file.read_bytes() for file in (tmp_path / "theirs").iterdir()}
    hub.stored |= {"preprocessor_config.json": b"{}", "flax_model.msgpack": b"x", "pytorch_model.bin": b"x"}
    return model


def test_what_exists_is_returned_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "owner/name").mkdir(parents=True)
    assert local_copy("owner/name") == Path("owner/name")
    assert local_copy("~/owner", "v2") == tmp_path / "owner"


def test_needed_files_of_a_repository(hub, published):
    folder = local_copy("owner/name")
    needed = {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert {file.name for file in folder.iterdir()} == needed == hub.fetched()
    assert local_copy("hf://owner/name") == local_copy("hf://owner/name", "main") == folder
    assert hub.fetched() == set()  # from the cache
    other = local_copy("hf://owner/name@v2")
    assert other == local_copy("owner/name", "v2")
    assert (folder.name, other.name) == (COMMITS["main"], COMMITS["v2"])


def test_pickles_only_without_safetensors(hub, published):
    hub.stored["pytorch_model.bin"] = hub.stored.pop("model.safetensors")
    assert (local_copy("owner/name") / "pytorch_model.bin").is_file()
    del hub.stored["pytorch_model.bin"]
    assert "has none of model.safetensors" in refusal(local_copy, "owner/name", "v2")


def test_one_file_comes_with_its_settings(hub, published):
    found = local_copy("hf://owner/name@v2/model.safetensors")
    assert {file.name for file in found.parent.iterdir()} == hub.fetched()
    assert hub.stored.keys() - {"flax_model.msgpack", "pytorch_model.bin"} == {f.name for f in found.parent.iterdir()}
    assert local_copy("owner/name", names=["config.json"]).joinpath("config.json").is_file()


def test_every_reader_takes_an_address(hub, published, run_cli, tmp_path):
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = published(image).logits
        for source in ("hf://owner/name", Path("hf://owner/name@v2"), "hf://owner/name/model.safetensors"):
            assert torch.allclose(load_pretrained(source, "classify")(image), expected, atol=1e-5)
    code, _, stderr = run_cli("export", "init_from=hf://owner/name@v2", "to=unilm", f"out={tmp_path / 'a.pth'}")
    assert code == 0, stderr
    assert torch.allclose(load_pretrained(tmp_path / "a.pth", "classify")(image), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("source", "revision", "said"),
    [
        ("runs/none/last.ckpt", None, r"does not exist here, and is no id of a model"),
        ("owner/none.pth", None, r"does not exist here, and is no id of a model"),
        ("none", None, r"none does not exist here"),
        ("", None, r"'' does not exist here"),
        ("~/owner/name", None, "~/owner/name does not exist here"),
        ("hf://owner", None, r"hf://OWNER/NAME"),
        ("hf://datasets/owner/name", None, r"hf://OWNER/NAME"),
        ("hf://owner/name/../x", None, r"hf://OWNER/NAME"),
        ("hf://owner/name@v2", "main", "names the revision v2, but revision=main"),
        ("owner/none", None, "is no path here, and cannot be fetched from the Hub: there is no such repository"),
        ("hf://owner/none", None, "cannot be fetched from the Hub: there is no such repository"),
        ("owner/name", "v3", "at revision v3: there is no such revision"),
        ("hf://owner/name/none.pth", None, "the repository owner/name has no file none.pth"),
    ],
)
def test_what_is_not_there(source, revision, said, hub, published):
    assert re.search(said, refusal(local_copy, source, revision))


def test_gated_and_offline(hub, published, monkeypatch):
    hub.gated = True
    assert re.search(
        r"it is gated: accept its terms at http.*/owner/name, and set HF_TOKEN", refusal(local_copy, "owner/name")
    )
    hub.gated = False
    folder = local_copy("owner/name")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert local_copy("hf://owner/name") == folder
    for revision in ("v2", "c" * 40):
        assert "HF_HUB_OFFLINE is set, and its cache does not have it" in refusal(local_copy, "owner/name", revision)


def test_nobody_there(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert re.search(
        r"127.0.0.1:9 gave nothing, and the cache .*`hf download owner/name`", refusal(local_copy, "owner/name")
    )


def test_server_error(hub, published):
    hub.next = [Answer(status=500)] * 9
    assert "gave nothing" in refusal(local_copy, "owner/name")
