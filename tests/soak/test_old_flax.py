"""The Flax networks against the Flax classes of transformers 4, which version 5 dropped.

BEIT_OLD_FLAX_PYTHON names the interpreter of an environment of their own: Python 3.11 with
pip install "transformers[flax]==4.57.6" "numpy<2" torch
"""

from __future__ import annotations

import os
import subprocess
from itertools import product
from pathlib import Path

import jax
import numpy as np
import pytest
from foreign import hf_classifier, hf_mim, scrambled

from beit_pretrain import flax as ours

OLD = os.environ.get("BEIT_OLD_FLAX_PYTHON", "")
pytestmark = [
    pytest.mark.soak,
    pytest.mark.long,
    pytest.mark.skipif(not OLD, reason="BEIT_OLD_FLAX_PYTHON names no interpreter with transformers 4"),
]


def networks(folder: Path) -> dict[str, str]:
    """Write a network and its inputs for every combination of options; names of the folders -> classes."""
    from transformers import BeitModel

    found = {}
    generator = np.random.default_rng(0)
    options_of = product(("shared", "per_layer", "none"), (0.1, None), (False, True), ("avg", "token"))
    for bias, scale, absolute, pool in options_of:
        options = {"bias": bias, "scale": scale, "absolute": absolute}
        classifier = hf_classifier(pool, **options)
        built = {"BeitForImageClassification": classifier, "BeitModel": scrambled(BeitModel(classifier.config))}
        if pool == "avg":  # with use_mean_pooling=False transformers normalises twice; no checkpoint does
            built["BeitForMaskedImageModeling"] = hf_mim(**options)
        for kind, model in built.items():
            name = f"{kind}-{bias}-{scale}-{absolute}-{pool}"
            model.save_pretrained(folder / name)
            image = generator.standard_normal((3, 3, 32, 32)).astype(np.float32)
            mask = (generator.random((3, 16)) < 0.4).astype(np.int32)  # a mask of bools fails in their arithmetic
            given = {"bool_masked_pos": mask} if "Masked" in kind else {}
            np.savez(folder / f"{name}.npz", kind=kind, pixel_values=image, **given)
            found[name] = kind
    return found


def test_equals_flax_of_transformers_4(tmp_path, measured):
    """Flax equals the classes that transformers 4 had, within 1e-5: every output, hidden state and attention."""
    kinds = networks(tmp_path)
    script = Path(__file__).with_name("old_flax.py")
    subprocess.run([OLD, script, tmp_path], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": ""})
    largest: dict[tuple[str, str], float] = {}
    for name, kind in kinds.items():
        model = getattr(ours, f"Flax{kind}").from_pretrained(tmp_path / name)
        given = {key: value for key, value in np.load(tmp_path / f"{name}.npz").items() if key != "kind"}
        call = jax.jit(lambda model, given: model(**given, output_hidden_states=True, output_attentions=True))
        output, expected = call(model, given), np.load(tmp_path / f"{name}.out.npz")
        found = {
            f"{key}.{i}": np.asarray(part)
            for key, value in zip(output.keys(), output, strict=True)
            for i, part in enumerate(value if isinstance(value, tuple) else (value,))
        }
        assert found.keys() == set(expected.files)
        for key, value in found.items():
            entry = (kind, key.partition(".")[0])
            largest[entry] = max(largest.get(entry, 0.0), float(np.abs(value - expected[key]).max()))
    measured((tmp_path / "versions.txt").read_text() + f"; {len(kinds)} networks")
    for (kind, key), value in sorted(largest.items()):
        measured(f"{kind} {key}: {value:.1e}")
    assert max(largest.values()) < 1e-5
