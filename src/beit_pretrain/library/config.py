"""`BeitConfig`: the configuration of a model under Hugging Face's names, and its file config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from beit_pretrain.errors import UserError
from beit_pretrain.fileio import expand_home
from beit_pretrain.models.checkpoints.hf import read_json
from beit_pretrain.models.checkpoints.hf_config import HFConfig
from beit_pretrain.models.checkpoints.hf_writer import write_json
from beit_pretrain.models.checkpoints.hub import FILE_ENDINGS, local_copy

FILE = "config.json"


class BeitConfig(HFConfig):
    """The architecture, heads and losses of a BEiT; names and defaults are those of transformers' BeitConfig.

    `BeitConfig()` is base with patches of 16 for 224 pixels. Fields: see `HFConfig`. Raises UserError, in one line, for
    unknown names and values that cannot be.
    """

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None, **changes: Any) -> Self:
        """From a folder with a config.json, the file itself, or a model of the Hub; `changes` replace its values."""
        place = local_copy(source, revision, names=(FILE,))
        return cls.from_json_file(place / FILE if place.is_dir() else place, **changes)

    @classmethod
    def from_json_file(cls, file: str | Path, **changes: Any) -> Self:
        """From a config.json. Raises UserError if it is damaged, or of another kind of model."""
        path = expand_home(file)
        if path.is_file() and path.suffix != ".json" and path.suffix.lower() in FILE_ENDINGS:
            raise UserError(f"{file} has weights: give a config.json, or the folder it is in")
        said = read_json(path)
        if not said:
            raise UserError(f"{file} does not exist, or is empty; a config.json is needed")
        if (kind := said.get("model_type", "beit")) != "beit":
            raise UserError(f"{file} is of a {kind} model, not of a beit")
        if changes.keys() & {"num_labels", "id2label", "label2id"}:
            said = {name: value for name, value in said.items() if name not in ("num_labels", "id2label", "label2id")}
        if unknown := changes.keys() - cls.model_fields.keys() - {"num_labels", "label2id"}:
            cls(**{name: changes[name] for name in unknown})  # refuses them in its words
        return cls.from_dict({**said, **changes})

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json into a folder, which is made if there is none. Raises UserError if it cannot be written."""
        path = expand_home(folder) / FILE
        try:
            if path.parent.is_file() or not str(folder):
                raise UserError(f"{folder or 'an empty name'} is a file or none; save_pretrained writes a folder")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, self.to_dict())
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
