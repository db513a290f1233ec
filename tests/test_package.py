"""The wheel carries its configs and works from any folder."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.long
def test_wheel_works_from_any_folder(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    # -I keeps the checkout's editable install out of the way of what stands first on the path.
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); from beit_pretrain.cli import main; main()"
    command = [sys.executable, "-I", "-c", code, "fit", "+experiment=base_22k", "--cfg"]
    result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=elsewhere)
    assert "name: base_22k" in result.stdout
    assert (tmp_path / "site/beit_pretrain/conf/experiment/base_22k.yaml").is_file()


def test_constraints_pin_every_dependency():
    pins = (ROOT / "constraints.txt").read_text()
    for name in (
        "torch==2.11.0",
        "torchvision==0.26.0",
        "lightning==",
        "timm==",
        "DALL-E==",
        "webdataset==",
        "wandb==",
    ):
        assert name in pins
    assert all("==" in line and "/" not in line for line in pins.split())  # names and versions, no addresses
