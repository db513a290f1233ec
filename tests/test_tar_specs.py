"""Names of many tars, as webdataset takes them: what they expand to, and what is refused in one line."""

from __future__ import annotations

import time

import pytest
from test_sources import write_folder
from webdataset.shardlists import expand_urls

from beit_pretrain.data import tar_specs
from beit_pretrain.data.tar_specs import expand, is_tar_spec
from beit_pretrain.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(
        tmp_path / "set", {f"x-{number:02d}.tar": b"" for number in range(12)} | {"notes.txt": b"", "._x.tar": b""}
    )
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("set/x-{00..02}.tar", ["set/x-00.tar", "set/x-01.tar", "set/x-02.tar"]),
        ("set/x-{02..00}.tar", ["set/x-02.tar", "set/x-01.tar", "set/x-00.tar"]),
        ("set/x-0{1,{3..5}}.tar", ["set/x-01.tar", "set/x-03.tar", "set/x-04.tar", "set/x-05.tar"]),
        ("set/x-0?.tar", [f"set/x-0{number}.tar" for number in range(10)]),
        ("set/x-{0,1}[01].tar", ["set/x-00.tar", "set/x-01.tar", "set/x-10.tar", "set/x-11.tar"]),
        ("set/x-07.tar::set/x-{00..01}.tar", ["set/x-07.tar", "set/x-00.tar", "set/x-01.tar"]),
        ("set", [f"set/x-{number:02d}.tar" for number in range(12)]),
        ("http://h/x-{000..002}.tar", ["http://h/x-000.tar", "http://h/x-001.tar", "http://h/x-002.tar"]),
        (
            "https://h/get?part={0..1}&sign=a%2Fb",
            ["https://h/get?part=0&sign=a%2Fb", "https://h/get?part=1&sign=a%2Fb"],
        ),
        ("hf://datasets/o/n@v1/a/x-{8..10}.tar", [f"hf://datasets/o/n@v1/a/x-{number}.tar" for number in (8, 9, 10)]),
        ("pipe:curl -s http://h/{a,b}.tar", ["pipe:curl -s http://h/a.tar", "pipe:curl -s http://h/b.tar"]),
        ("pipe:cat a.tar::pipe:cat b.tar", ["pipe:cat a.tar", "pipe:cat b.tar"]),
        ("pipe:awk '{print}' a.tar", ["pipe:awk '{print}' a.tar"]),
    ],
)
def test_expands(folder, spec, expected):
    assert expand(spec) == expected


@pytest.mark.parametrize(
    "spec",
    ["pipe:cat {a..c}.tar | head::http://c/d.tar", "http://h/{0..10..5}-{a,b}.tar", "http://h/a.tar::http://h/b.tar"],
)
def test_as_webdataset_does(folder, spec):
    assert expand(spec) == expand_urls(spec)


def test_what_exists_under_the_typed_name_is_that(folder):
    write_folder(folder / "a{1..2}", {"y.tar": b""})
    write_folder(folder, {"z{1,2}.tar": b"", "b::c.tar": b"", "w[1].tar": b""})
    assert expand("a{1..2}") == ["a{1..2}/y.tar"]
    assert expand("z{1,2}.tar") == ["z{1,2}.tar"]
    assert expand("b::c.tar") == ["b::c.tar"]
    assert expand("w[1].tar") == ["w[1].tar"]
    assert not any(map(is_tar_spec, ("a{1..2}", "z{1,2}.tar", "b::c.tar", "w[1].tar", "set")))


def test_file_addresses_are_paths(folder):
    address = (folder / "set").as_uri()
    assert expand(f"{address}/x-{{00..01}}.tar") == [str(folder / "set/x-00.tar"), str(folder / "set/x-01.tar")]


def test_what_is_a_specification():
    for spec in (
        "a-{0..1}.tar",
        "a::b",
        "x/*.tar",
        "https://h/a.tar?sign=x",
        "pipe:cat a.tar",
        "hf://datasets/o/n/*.tar",
    ):
        assert is_tar_spec(spec)
    for location in ("pipe:cat {name}", "https://h/folder", "https://h/folder?sign=*", "hf://datasets/o/n", "folder"):
        assert not is_tar_spec(location)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("none-{0000..4095}.tar", r"nothing matches; the first of its 4,096 names, none-0000.tar, is no file"),
        ("set/x-{00..13}.tar", r"set/x-12.tar does not exist \(2 of 14 names\)"),
        ("set/y-*.tar", r"set/y-\*.tar: no tar matches"),
        ("set/{y,z}-*.tar", "no tar matches, of which the first name is set/y"),
        ("none.tar", "none.tar does not exist"),
        ("set/x-{00..02.tar", "its braces do not close"),
        ("http://h/x-{00..02.tar", "its braces do not close"),
        ("http://h/x-00}.tar", "its braces do not close"),
        ("http://h/{0..1000000}.tar", "more than 1,000,000 names"),
        ("http://h/{0..999999999999999999999}.tar", "more than 1,000,000 names"),
        ("set/x-0{1,2}.tar::set/x-02.tar", r"names set/x-02.tar twice"),
        ("http://h/{a,a}.tar?sign=secret", r"names http://h/a.tar twice"),
        ("http://h/folder", r"http cannot list a folder; name its tars by braces, such as http://h/folder/x-"),
        ("http://h/x-*.tar?sign=secret", "http cannot list files"),
        ("a.tar::", "without a name"),
        ("pipe:cat {name}", "shard folder"),
    ],
)
def test_errors_are_one_line_and_quick(folder, spec, said):
    start = time.monotonic()
    with pytest.raises(UserError, match=said) as caught:
        expand(spec)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert time.monotonic() - start < 5


def test_many_names(monkeypatch):
    monkeypatch.setattr(tar_specs, "MOST", 20_000)
    names = expand("http://h/{00000..19999}.tar")
    assert (len(names), names[1]) == (20_000, "http://h/00001.tar")
    with pytest.raises(UserError, match="more than 20,000 names"):
        expand("http://h/{0..99}/{0..200}.tar")


def test_a_glob_of_other_files_says_so(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"no tar matches; other files and folders are given without \*"):
        expand(f"{tmp_path}/*.parquet")
