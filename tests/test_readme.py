"""Every command of the README runs, from a folder of images to a classifier, at a small size."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from loopback import Server, serving

README_FILE = Path(__file__).parents[1] / "README.md"
README = README_FILE.read_text()
BLOCKS = re.findall(r"<!-- (?:commands|as it is):.*?```sh\n(.*?)```", README, re.DOTALL)
URL = "http://localhost:8000/shard-{000000..000003}.tar"
SMALL = {
    "demo_tokenizer": "image_size=32 model.vocab_size=16 model.width=8",
    "demo_pretrain": "image_size=32 mask.max_patches=6 mask.min_block=1 model.embed_dim=32 model.depth=2",
    "tokenizer": "image_size=32 model.vocab_size=16 model.width=8 model.blocks=1 model.code_dim=8",
    "small_own": "image_size=32 patch_size=8 mask.max_patches=6 mask.min_block=1 epochs=null optim.warmup_epochs=null "
    "model.size=null +model.embed_dim=32 +model.depth=2 +model.num_heads=2",
    "finetune_own": "image_size=32 patch_size=8 epochs=null optim.warmup_epochs=null model.size=null "
    "+model.embed_dim=32 +model.depth=2 +model.num_heads=2",
}
BRIEF = "steps=2 global_batch_size=4 data.num_workers=0 threads=1"


def commands() -> list[str]:
    assert len(BLOCKS) == 2
    return [line for block in BLOCKS for line in block.splitlines() if line]


@pytest.fixture(scope="module")
def place(tmp_path_factory, photos) -> Path:
    folder = tmp_path_factory.mktemp("newcomer")
    shutil.copytree(photos, folder / "PHOTOS")
    return folder


@pytest.mark.parametrize("number", range(len(commands())))
def test_readme_command(number, place, run_cli, monkeypatch):
    monkeypatch.chdir(place)  # each command uses the files of the previous ones
    words = shlex.split(commands()[number])
    assert words[:3] == ["python", "-m", "beit_pretrain"]
    experiment = next((w.split("=")[1] for w in words if w.startswith("+experiment=")), None)
    extra = f"{BRIEF} {SMALL[experiment]}".split() if experiment else []
    extra += ["data.num_workers=0", "threads=1", "linear.epochs=2"] if words[3] == "probe" else []
    with serving(Server({f"/{tar.name}": tar.read_bytes() for tar in place.glob("data/photos/train/*.tar")})) as server:
        here = f"{server.url}/shard-{{000000..{len(server.files) - 1:06d}}}.tar"
        code, stdout, stderr = run_cli(*(word.replace(URL, here) for word in words[3:]), *extra)
    assert code == 0, stderr
    assert (URL in commands()[number]) == any(path.endswith(".tar") for path, *_ in server.asked)


def test_files_written_by_readme_commands(place):
    rows = (place / "predictions.csv").read_text().splitlines()
    assert rows[0] == "file,rank,class,probability,index"
    assert len(rows) > 10
    for run in ("tokenizer", "small_own", "finetune_own", "demo/tokenizer", "demo/pretrain", "from_tars"):
        assert (place / "runs" / run / "checkpoints/last.ckpt").is_file()
        assert (place / "runs" / run / "metrics.csv").read_text().count("\n") >= 2
    for name in ("masked", "attention", "tokens", "curves", "curves-small_own-finetune_own"):
        assert (place / "runs/small_own/pictures" / f"{name}.png").is_file()
    assert (place / "runs/small_own/checkpoints/probe/layers.csv").read_text().count("\n") == 3


@pytest.mark.parametrize("page", ["README.md", "data/README.md", "docs"])
def test_relative_links_lead_to_files(page):
    place = README_FILE.parent / page
    for file in place.glob("*.md") if place.is_dir() else [place]:
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", file.read_text()):
            assert ":" in link or (file.parent / link).exists(), f"{file.name}: {link}"


def test_module_tree_is_complete():
    """And nothing that does not exist."""
    root, named, folder = Path(__file__).parents[1] / "src/beit_pretrain", set(), Path()
    tree = (root.parents[1] / "docs/architecture.md").read_text().partition("    src/beit_pretrain/\n")[2]
    for line in tree.splitlines():
        if found := re.match(r"      ([a-z/]+)/ — ", line):
            folder = Path(found[1])
        if found := re.match(r"      (\w+\.py) ", line):
            named.add(folder / found[1])
    assert named == {path.relative_to(root) for path in root.rglob("*.py") if path.name != "__init__.py"}
