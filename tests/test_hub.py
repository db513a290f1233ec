"""hf:// locations against a small Hub on this machine: what is there, private, gated, gone, or out of reach."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler

import huggingface_hub
import pytest
from loopback import Answer, Server, serving

from beit_pretrain.data import storage, transports
from beit_pretrain.data.storage import Remote, download
from beit_pretrain.errors import UserError

CONTENT = bytes(range(256)) * 40
TOKEN = "hf_secret"


class Hub(Server):
    """Repositories by their addresses in the API; their files lie on another server. Knows one token."""

    elsewhere = ""
    private = False

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        allowed = not self.private or handler.headers["Authorization"] == f"Bearer {TOKEN}"
        found = re.fullmatch(r"/(?:datasets/)?owner/name/resolve/(\w+)/(.+)", handler.path)
        if handler.path in self.files and allowed:
            super().answer(handler)
            return
        if found and allowed and not self.next:
            self.next = [Answer(status=302, headers={"Location": f"{self.elsewhere}/{found[1]}/{found[2]}?sign=a%2Fb"})]
        if not self.next:
            code = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            self.next = [Answer(status=401, headers=code)]
        super().answer(handler)


@pytest.fixture
def hub(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(storage, "LONGEST_PAUSE", 0.01)
    with serving(Hub()) as server, serving() as files:
        server.elsewhere, server.store = files.url, files
        for kind in ("datasets", "models"):
            for revision in ("", "/revision/v2"):
                server.files[f"/api/{kind}/owner/name{revision}"] = json.dumps({"id": "owner/name"}).encode()
        for revision in ("main", "v2"):
            files.files[f"/{revision}/train/a.tar?sign=a%2Fb"] = CONTENT + revision.encode()
        address = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(
            huggingface_hub.constants.ENDPOINT, server.url
        )
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        transports._file_system.cache_clear()
        yield server
    transports._file_system.cache_clear()


def fetched(location: str, size: int, name: str = "a.tar", retries: int = 0) -> bytes:
    out = io.BytesIO()
    Remote(location, retries).fetch(name, out, size, lambda: None)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["", "datasets/"])
@pytest.mark.parametrize("revision", ["main", "v2"])
def test_a_file_of_a_repository(hub, kind, revision):
    suffix = "" if revision == "main" else f"@{revision}"
    expected = CONTENT + revision.encode()
    assert fetched(f"hf://{kind}owner/name{suffix}/train", len(expected)) == expected
    asked = [path for path, *_ in hub.asked]
    assert fetched(f"hf://{kind}owner/name{suffix}/train/", len(expected)) == expected
    assert hub.asked[len(asked) :][0][0].startswith(f"/{kind}owner/name/resolve/")  # the repository is known by now


def test_a_broken_connection_is_resumed(hub):
    hub.store.next = [Answer(cut=5000)]
    assert fetched("hf://datasets/owner/name/train", len(CONTENT) + 4, retries=1) == CONTENT + b"main"
    assert [asked[1] for asked in hub.store.asked] == [None, "bytes=5000-"]


def test_a_private_repository_needs_the_token_of_the_environment(hub, monkeypatch):
    hub.private = True
    with pytest.raises(UserError, match=r"a\.tar of hf://datasets/owner/name/train cannot be fetched: .*not found"):
        fetched("hf://datasets/owner/name/train", 10, retries=3)
    transports._file_system.cache_clear()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert fetched("hf://datasets/owner/name/train", len(CONTENT) + 4) == CONTENT + b"main"
    assert [handed[0] for handed in hub.store.asked] == ["/main/train/a.tar?sign=a%2Fb"]  # as it was signed
    assert hub.store.authorizations == [None]  # other servers do not see it


def test_failures_of_the_hub_are_one_line(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    gated = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to dataset owner/name is restricted."}
    for location, answers, said in (
        ("hf://datasets/owner/none/train", [], "repository not found"),
        ("hf:", [], "Invalid HF URI"),
        ("hf://buckets/owner/name/train", [Answer(status=404)], ""),
        ("hf://owner/name/nothing", [], "HTTP 404"),
        ("hf://owner/name/train", [Answer(status=403, headers=gated)], "HTTP 403 Access to dataset .*HF_TOKEN"),
        ("hf://owner/name/train", [Answer(status=503)] * 9, "HTTP 503"),
    ):
        fetched("hf://owner/name/train", len(CONTENT) + 4)
        hub.next = answers
        with pytest.raises(UserError, match=rf"a\.tar of {location}.* cannot be fetched.*{said}") as caught:
            fetched(location, 10)
        hub.next = []
        assert "\n" not in str(caught.value)
        assert TOKEN not in str(caught.value)


def test_offline_is_said_at_once(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot be fetched: .*offline mode is enabled.*HF_HUB_OFFLINE") as caught:
        fetched("hf://owner/name/train", 10, retries=9)
    assert "\n" not in str(caught.value)


def test_nobody_there(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"\(2 tries\): ConnectError: .*refused"):
        fetched("hf://owner/name/train", 10, retries=1)


def test_downloads(hub, tmp_path):
    download("hf://owner/name/train/a.tar", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT + b"main"


def test_nothing_is_imported_before_it_is_needed():
    code = "import sys; import beit_pretrain.__main__, beit_pretrain.data.reader; "
    code += "print({'aiohttp', 'fsspec', 'huggingface_hub', 'torch'} & sys.modules.keys() or 'none')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "none\n"
