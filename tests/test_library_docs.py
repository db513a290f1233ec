"""The examples of docs/transformers.md, on models, run as they are printed."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs/transformers.md"
MODELS = PAGE.read_text().partition("\n## Image processor\n")[0]


@pytest.mark.parametrize("example", re.findall(r"```python\n(.*?)```", MODELS, re.S))
def test_examples_run(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(action="ignore"):  # a pooler that starts afresh
        exec(compile(example, str(PAGE), "exec"), {})
