"""Words of the command line: paths and texts are read as they are typed, alone and in lists."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from beit_pretrain.config import compose
from beit_pretrain.errors import UserError
from beit_pretrain.inference.settings import PredictSettings
from beit_pretrain.overrides import literal, readable


def read(word: str):
    """The value of a setting of `predict`."""
    override = OverridesParser.create().parse_override(readable(word, PredictSettings))
    return OmegaConf.to_container(OmegaConf.create({"init_from": "x", "key": override.value()}), resolve=True)["key"]


ODD = (
    "a=1;two words;a b=c;x(1);ä;50%;it's;#1;true;007;1_000;1e3;null;-x;c:d;b\\s;b\\;q\"q;{x};inf;0x10;2024-01-01;1.50;"
    "a[1];*;?;a|b;@;!x;&;a\tb;nan;.5;1e-3;yes;${;$x;a$b;{a:1}x;str(1)x;<x>;`x`;^"
).split(";")


@pytest.mark.parametrize("name", ODD)
def test_paths_are_read_as_typed(name):
    for value in ([name] if name not in ("null", "${") else []) + [f"x/{name}/{name}"] * (name != "${"):
        assert [read(f"{key}={value}") for key in ("src", "init_from", "out")] == [value] * 3
    if name != "${":
        assert read(f"src=[{name}]") == [name]
    if name not in ("${", "b\\"):  # \\, is a comma in Hydra's grammar
        assert read(f"src=[/y/{name},{name}, z ]") == [f"/y/{name}", name, "z"]


NAMES = "[r];[1,2];a,b;'q';\"q\";null;${x};a${b;\\${x};str(1);{a:1};[a;a];a\\,b; x;choice(a,b);range(1,3)"


@pytest.mark.parametrize("name", NAMES.split(";"))
def test_name_of_an_existing_file_is_that_file(name, tmp_path, monkeypatch):
    """Also where the same text would be a list, quotes, an interpolation or a function."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    assert read(f"src={name}") == name
    if name not in ("a,b", "[1,2]", "choice(a,b)", "range(1,3)", " x"):
        assert read(f"src=[{name},y]") == [name, "y"]


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("a,b", ["a", "b"]),
        (" a , b c ", ["a", "b c"]),
        ("'a,b',c", ["a,b", "c"]),
        ('"a,b","c\'d"', ["a,b", "c'd"]),
        ("'it\\'s',x", ["it's", "x"]),
        ("it's,x's", ["it's", "x's"]),
        (r"a\,b,c", ["a,b", "c"]),
        ("${oc.env:NOT_SET,d}/x,b=1", ["d/x", "b=1"]),
        ("${init_from},b=1", ["x", "b=1"]),
    ],
)
def test_items_of_a_list(text, items):
    assert read(f"src=[{text}]") == items


@pytest.mark.parametrize("value", ["[a,,b]", "[a=1,]", "[]"])
def test_lists_with_nothing_in_them_are_refused(value):
    with pytest.raises(UserError):
        compose("predict", [f"src={value}", "init_from=x"])


def test_interpolations_in_lists_are_resolved(monkeypatch):
    monkeypatch.setenv("DATA", "/data,1")
    words = ["src=[${oc.env:DATA}/a=1,${oc.env:NOT_SET,d}/b,${init_from}]", "init_from=x"]
    assert compose("predict", words).src == ["/data,1/a=1", "d/b", "x"]


def test_texts_may_look_like_numbers():
    assert compose("compare", ["src=x", "precision=32"]).precision == "32"
    assert compose("compare", ["src=x", "name=1e3"]).name == "1e3"
    assert compose("fit", ["+experiment=tokenizer", "data.train=1_0", "run_dir=1e3"]).data.train == "1_0"


def test_null_stays_null_where_it_may(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="src must be a path, or a list of paths, got null"):
        compose("predict", ["src=null", "init_from=x"])
    (tmp_path / "null").mkdir()
    assert compose("predict", ["src=null", "init_from=x", "out=null"]).out is None


def test_numbers_stay_numbers():
    cfg = compose("predict", ["src=x", "init_from=x", "top=1_0", "test.scales=[1,2]", "test.flip=true"])
    assert (cfg.top, cfg.test.scales, cfg.test.flip) == (10, [1.0, 2.0], True)


@pytest.mark.parametrize("text", ["a", "a${b}", "a\\${b}", "$x", "${", "a\\\\${b}c\\"])
def test_literal_is_no_interpolation(text):
    assert read(f"src={literal(text)}") == text
