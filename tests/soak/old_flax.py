"""Run by an interpreter with transformers 4: the outputs of its Flax classes for the networks in a folder.

python old_flax.py FOLDER: FOLDER/NAME.npz has the inputs of the network in FOLDER/NAME, FOLDER/NAME.out.npz gets
its outputs, and FOLDER/versions.txt the versions.
"""

import sys
from pathlib import Path

import flax
import jax
import numpy as np
import transformers

folder = Path(sys.argv[1])
for file in sorted(folder.glob("*.npz")):
    given = dict(np.load(file))
    kind = getattr(transformers, f"Flax{given.pop('kind')!s}")
    model = kind.from_pretrained(folder / file.stem, from_pt=True)
    output = model(**given, output_hidden_states=True, output_attentions=True)
    found = {}
    for name, value in output.items():
        parts = value if isinstance(value, tuple) else (value,)
        found.update({f"{name}.{i}": np.asarray(part) for i, part in enumerate(parts)})
    np.savez(folder / f"{file.stem}.out.npz", **found)
(folder / "versions.txt").write_text(
    f"transformers {transformers.__version__}, flax {flax.__version__}, jax {jax.__version__}"
)
