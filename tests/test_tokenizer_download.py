"""The verb download: OpenAI's files from the network, recorded, converted to the bit; nothing in them is executed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import safetensors.torch
import torch
from loopback import Answer, serving

from beit_pretrain import fileio
from beit_pretrain.config import compose
from beit_pretrain.data import storage
from beit_pretrain.errors import UserError
from beit_pretrain.tokenizers import download as module
from beit_pretrain.tokenizers.tokenizer import OpenAITokenizer

PICKLES = ["decoder.pkl", "encoder.pkl"]
WHOLE = ["decoder.pkl", "decoder.safetensors", "encoder.pkl", "encoder.safetensors", "weights.json"]
ROOT = Path(__file__).parents[1]


@pytest.fixture
def server(openai_files, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(storage, "sleep", lambda seconds: None)
    with serving() as server:
        server.files = {f"/{name}": (openai_files / name).read_bytes() for name in PICKLES}
        yield server


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "dall-e"


@pytest.fixture(scope="session")
def fetched(openai_files, tmp_path_factory) -> Path:
    """A folder as `download` leaves it."""
    out = tmp_path_factory.mktemp("fetched") / "out"
    module.download(compose("download", [f"src={openai_files}", f"out={out}"]))
    return out


@pytest.fixture
def copy(fetched, out) -> Path:
    shutil.copytree(fetched, out)
    return out


def one_line(result) -> str:
    code, _, stderr = result
    lines = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert code == 2, stderr
    assert len(lines) == 1, stderr
    assert "Traceback" not in stderr
    return lines[0]


def addresses(server) -> list[str]:
    return [f"encoder={server.url}/encoder.pkl", f"decoder={server.url}/decoder.pkl"]


def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class TestFetch:
    def test_download_convert_and_use(self, server, openai_files, out, run_cli):
        before = OpenAITokenizer(openai_files)
        code, stdout, stderr = run_cli("download", f"out={out}", *addresses(server))
        assert code == 0, stderr
        assert f"tokenizer.path={out}" in stdout
        assert sorted(os.listdir(out)) == WHOLE
        for name in PICKLES:
            assert (out / name).read_bytes() == (openai_files / name).read_bytes()
        after = OpenAITokenizer(out)
        ids = before.encode(images())
        assert torch.equal(after.encode(images()), ids)
        assert torch.equal(after.decode(ids), before.decode(ids))
        for one, other in ((before.encoder, after.encoder), (before.decoder, after.decoder)):
            a, b = one.state_dict(), other.state_dict()
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) for name in a)

    def test_the_record(self, fetched, openai_files):
        record = json.loads((fetched / "weights.json").read_text())
        assert sorted([*record, "weights.json"]) == WHOLE
        for name, entry in record.items():
            data = (fetched / name).read_bytes()
            assert (entry["bytes"], entry["sha256"]) == (len(data), sha256(data).hexdigest())
        assert record["encoder.pkl"]["source"] == (openai_files / "encoder.pkl").as_uri()
        assert record["encoder.safetensors"]["source"] == "encoder.pkl"

    def test_a_second_time_asks_nobody(self, server, copy, run_cli):
        before = {path.name: path.stat().st_mtime_ns for path in copy.iterdir()}
        assert run_cli("download", f"out={copy}", *addresses(server))[0] == 0
        assert not server.asked
        assert {path.name: path.stat().st_mtime_ns for path in copy.iterdir()} == before

    def test_files_put_there_by_hand(self, server, openai_files, out, run_cli):
        shutil.copytree(openai_files, out)
        assert run_cli("download", f"out={out}", *addresses(server))[0] == 0
        assert not server.asked
        assert sorted(os.listdir(out)) == WHOLE
        assert json.loads((out / "weights.json").read_text())["encoder.pkl"]["source"] == "put there by hand"

    @pytest.mark.parametrize("scheme", ["{server}", "{folder}", "file://{folder}", "file://{folder}/"])
    def test_sources(self, scheme, server, openai_files, out, run_cli):
        src = scheme.format(server=server.url, folder=openai_files)
        code, _, stderr = run_cli("download", f"out={out}", f"src={src}")
        assert code == 0, stderr
        assert sorted(os.listdir(out)) == WHOLE

    def test_broken_and_resumed_by_the_next_command(self, server, out, run_cli):
        size = len(server.files["/encoder.pkl"])
        server.next = [Answer(cut=size // 2), Answer(status=403)]
        assert "403" in one_line(run_cli("download", f"out={out}", *addresses(server)))
        assert not [name for name in os.listdir(out) if not name.startswith(".")]
        server.asked.clear()
        assert run_cli("download", f"out={out}", *addresses(server))[0] == 0
        assert server.asked[0] == ("/encoder.pkl", f"bytes={size // 2}-", '"1"')
        assert sorted(os.listdir(out)) == WHOLE

    def test_partial_files_are_removed_when_the_whole_file_is_present(self, server, openai_files, out, run_cli):
        server.next = [Answer(cut=1000), Answer(status=403)]
        one_line(run_cli("download", f"out={out}", *addresses(server)))
        shutil.copytree(openai_files, out, dirs_exist_ok=True)
        assert run_cli("download", f"out={out}", *addresses(server))[0] == 0
        assert sorted(os.listdir(out)) == WHOLE

    def test_leftovers_of_a_killed_process_are_removed(self, openai_files, out, run_cli):
        out.mkdir()
        for name in ("fetch.lock", "encoder.pkl.lock", "encoder.pkl.partial", "encoder.pkl.partial.json"):
            (out / f".{name}").write_text("left over")
        for name in ("encoder.safetensors.partial", "weights.json.partial"):
            (out / f".{name}").write_text("half")
        assert run_cli("download", f"out={out}", f"src={openai_files}")[0] == 0
        assert sorted(os.listdir(out)) == WHOLE

    def test_a_file_or_folder_in_the_way_is_refused(self, openai_files, out, run_cli, tmp_path):
        (tmp_path / "file").write_text("")
        one_line(run_cli("download", f"out={tmp_path / 'file'}", f"src={openai_files}"))
        (out / "encoder.pkl").mkdir(parents=True)
        assert "encoder.pkl" in one_line(run_cli("download", f"out={out}", f"src={openai_files}"))
        assert os.listdir(out) == ["encoder.pkl"]

    def test_without_a_network(self, out, run_cli, monkeypatch):
        monkeypatch.setattr(storage, "sleep", lambda seconds: None)
        nowhere = [f"{kind}=http://127.0.0.1:9/{kind}.pkl" for kind in module.KINDS]  # port 9: discard
        said = one_line(run_cli("download", f"out={out}", *nowhere))
        assert "without a network: download http://127.0.0.1:9/encoder.pkl and http://127.0.0.1:9/decoder.pkl" in said
        assert f"put what you got into {out} here, and run the same command again" in said

    @pytest.mark.long
    def test_two_processes_at_once(self, server, out):
        server.next = [Answer(slow=0.0002)]
        command = [sys.executable, "-m", "beit_pretrain", "download", f"out={out}", *addresses(server)]
        running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
        for process in running:
            _, stderr = process.communicate(timeout=120)
            assert process.returncode == 0, stderr
        assert sorted(asked[0] for asked in server.asked) == ["/decoder.pkl", "/encoder.pkl"]
        assert sorted(os.listdir(out)) == WHOLE

    def test_a_read_only_folder_still_serves_its_files(self, copy, run_cli, monkeypatch):
        def refuse(*words, **settings):
            raise PermissionError(13, "Permission denied", str(copy))

        monkeypatch.setattr(fileio, "exclusive_lock", refuse)
        assert run_cli("download", f"out={copy}")[0] == 0
        (copy / "decoder.safetensors").unlink()
        assert "Permission denied" in one_line(run_cli("download", f"out={copy}"))

    def test_wrong_settings(self, openai_files, out, run_cli, tmp_path):
        (tmp_path / "half").mkdir()
        shutil.copy(openai_files / "encoder.pkl", tmp_path / "half")
        assert "holds no decoder.pkl" in one_line(run_cli("download", f"out={out}", f"src={tmp_path / 'half'}"))
        assert "no encoder.pkl and no decoder.pkl" in one_line(run_cli("download", f"out={out}", "src=nowhere"))
        assert "src must be a text" in one_line(run_cli("download", f"out={out}", "src=[a,b]"))
        assert "is no address" in one_line(run_cli("download", f"out={out}", "src=ftp://host/x"))
        assert "out is missing" in one_line(run_cli("download"))
        assert not out.exists() or not list(out.iterdir())


class TestRefusals:
    @pytest.mark.parametrize(
        ("what", "said"),
        [
            ("page", "it is a web page"),
            ("empty", "it is empty"),
            ("text", "is not OpenAI's encoder.pkl"),
            ("truncated", "is not OpenAI's encoder.pkl"),
            ("decoder", "holds a Decoder, not the Encoder"),
            ("tensor", "holds a Tensor, not the Encoder"),
            ("hostile", "is not OpenAI's encoder.pkl"),
            ("hostile zip", "is not OpenAI's encoder.pkl"),
            ("hollow", "names more numbers than it holds"),
            ("odd", "is not OpenAI's encoder.pkl"),
            ("cyclic", "is not OpenAI's encoder.pkl"),
            ("flat", "does not have the tensors of OpenAI's encoder"),
        ],
    )
    @pytest.mark.parametrize("way", ["http", "folder", "by hand"])
    def test_files_that_are_not_the_encoder_are_refused(
        self, way, what, said, server, openai_files, out, run_cli, tmp_path
    ):
        data = bad_file(what, openai_files, tmp_path)
        (tmp_path / "src").mkdir()
        (tmp_path / "src/encoder.pkl").write_bytes(data)
        shutil.copy(openai_files / "decoder.pkl", tmp_path / "src")
        server.files["/encoder.pkl"] = data
        words = addresses(server)
        if way == "folder":
            words = [f"src={tmp_path / 'src'}"]
        elif way == "by hand":
            shutil.copytree(tmp_path / "src", out)
        assert said in one_line(run_cli("download", f"out={out}", *words))
        assert not (tmp_path / "executed").exists()
        # A person's own file is not deleted; of what was fetched, nothing stays.
        assert sorted(os.listdir(out)) == (PICKLES if way == "by hand" else [])

    @pytest.mark.parametrize("name", [name for name in WHOLE if name != "weights.json"])
    @pytest.mark.parametrize("how", ["size", "bit"])
    def test_a_file_that_changed(self, how, name, server, copy, run_cli):
        data = bytearray((copy / name).read_bytes())
        data[-1] ^= 1
        (copy / name).write_bytes(data if how == "bit" else data[:-1])
        said = one_line(run_cli("download", f"out={copy}", *addresses(server)))
        assert f"{copy / name} has changed since it was recorded in weights.json" in said
        assert ("another SHA-256" if how == "bit" else f"{len(data) - 1} bytes, not {len(data)}") in said
        assert not server.asked
        if name.endswith("safetensors"):
            with pytest.raises(UserError, match="has changed since it was recorded"):
                OpenAITokenizer(copy).decode(torch.zeros(1, 16, dtype=torch.int64))
        (copy / name).unlink()  # what the line says helps
        assert run_cli("download", f"out={copy}", *addresses(server))[0] == 0
        OpenAITokenizer(copy).decode(torch.zeros(1, 16, dtype=torch.int64))

    def test_another_file_at_the_address_later(self, server, openai_files, copy, run_cli, tmp_path):
        for path in copy.glob("encoder.*"):
            path.unlink()
        encoder = torch.load(openai_files / "encoder.pkl", weights_only=False)
        encoder.blocks.input.b.data += 1
        torch.save(encoder, tmp_path / "other.pkl")
        server.files["/encoder.pkl"] = (tmp_path / "other.pkl").read_bytes()
        said = one_line(run_cli("download", f"out={copy}", *addresses(server)))
        assert f"is not the encoder.pkl recorded in {copy / 'weights.json'}" in said
        assert not list(copy.glob("*encoder*"))

    @pytest.mark.parametrize(
        "text", ["", "[]", "[1]", "{", '{"encoder.safetensors": 1}', '{"x": {"bytes": 1}}', "null"]
    )
    def test_damaged_records_are_refused(self, text, copy, run_cli):
        (copy / "weights.json").write_text(text)
        assert "weights.json is no record of weights" in one_line(run_cli("download", f"out={copy}"))
        with pytest.raises(UserError, match="is no record of weights"):
            OpenAITokenizer(copy)

    def test_a_conversion_that_goes_wrong_leaves_nothing(self, openai_files, out, run_cli, monkeypatch):
        save = safetensors.torch.save

        def wrong(tensors, metadata):
            return save({name: t + (name == "blocks.input.b") * 1e-7 for name, t in tensors.items()}, metadata)

        monkeypatch.setattr(safetensors.torch, "save", wrong)
        said = one_line(run_cli("download", f"out={out}", f"src={openai_files}"))
        assert "what was written is not what" in said
        assert sorted(os.listdir(out)) == ["encoder.pkl", "weights.json"]


class TestOnlyTheSafetensors:
    def test_pickles_are_not_opened(self, copy, monkeypatch, capsys):
        monkeypatch.setattr(torch, "load", None)
        for name in PICKLES:
            (copy / name).unlink()
        tokenizer = OpenAITokenizer(copy)
        assert tokenizer.decode(tokenizer.encode(images())).shape == (2, 3, 32, 32)
        assert capsys.readouterr().err == ""

    def test_pickles_may_be_deleted(self, server, copy, run_cli):
        for name in PICKLES:
            (copy / name).unlink()
        assert run_cli("download", f"out={copy}", *addresses(server))[0] == 0
        assert not server.asked

    def test_a_broken_one_is_not_replaced_by_the_pickle(self, copy):
        (copy / "weights.json").unlink()
        data = (copy / "encoder.safetensors").read_bytes()
        for damaged in (b"", b"text", data[: len(data) // 2], data[:-1], b"\xff" * 100):
            (copy / "encoder.safetensors").write_bytes(damaged)
            with pytest.raises(UserError, match="is not a safetensors file of the encoder"):
                OpenAITokenizer(copy)
        shutil.copy(copy / "decoder.safetensors", copy / "encoder.safetensors")
        with pytest.raises(UserError, match="does not have the tensors of OpenAI's encoder"):
            OpenAITokenizer(copy)

    def test_without_a_record_they_are_read_all_the_same(self, copy, run_cli):
        (copy / "weights.json").unlink()
        ids = OpenAITokenizer(copy).encode(images())
        assert run_cli("download", f"out={copy}")[0] == 0  # made again from the pickles
        assert sorted(os.listdir(copy)) == WHOLE
        assert torch.equal(OpenAITokenizer(copy).encode(images()), ids)

    def test_a_folder_of_pickles_says_how_to_convert_them(self, openai_files, capsys):
        OpenAITokenizer(openai_files)
        said = capsys.readouterr().err
        assert f"python -m beit_pretrain download out={openai_files}" in said
        assert said.count("\n") == 1


def bad_file(what: str, openai_files: Path, folder: Path) -> bytes:
    """What stands in the encoder's place."""
    encoder = torch.load(openai_files / "encoder.pkl", weights_only=False)
    simple = {
        "page": b"\n <!DOCTYPE html><html><body>403 Forbidden</body></html>",
        "empty": b"",
        "text": b"not found\n",
        "truncated": (openai_files / "encoder.pkl").read_bytes()[:-1000],
        "decoder": (openai_files / "decoder.pkl").read_bytes(),
        "hostile": pickle.dumps(Hostile(folder / "executed"), 2),
    }
    if what in simple:
        return simple[what]
    if what == "hollow":  # one number that claims to be many
        encoder.blocks.input.w = torch.nn.Parameter(torch.zeros(1).expand(2**20, 3, 7, 7))
    elif what == "odd":
        encoder.__dict__["_parameters"]["w"] = "no tensor"
    elif what == "cyclic":
        encoder.__dict__["_modules"]["again"] = encoder
    elif what == "flat":
        encoder.blocks.input.w = torch.nn.Parameter(torch.zeros(8))
    content = {"tensor": torch.zeros(3), "hostile zip": Hostile(folder / "executed")}.get(what, encoder)
    torch.save(content, folder / "bad.pkl")
    return (folder / "bad.pkl").read_bytes()


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)
