"""The verb `shards`: make, index, verify, show."""

from __future__ import annotations

from pathlib import Path

from beit_pretrain.data.write.settings import EncodeSettings, ShardsSettings
from beit_pretrain.errors import UserError
from beit_pretrain.fileio import expand_home
from beit_pretrain.settings import to_dict


def shards(cfg: ShardsSettings) -> None:
    """make: write shards; index: take over existing ones; verify: check them, exit code 2 if anything is wrong; show:
    summary and contact sheet."""
    from beit_pretrain.data.left_out import summary as left_out_summary
    from beit_pretrain.data.manifest import MANIFEST, read_manifest, summary, verify_shards
    from beit_pretrain.data.reader import ShardReader
    from beit_pretrain.data.settings import RemoteOptions, SourceSettings
    from beit_pretrain.data.storage import is_remote
    from beit_pretrain.data.verify_images import faults
    from beit_pretrain.data.write.contact_sheet import contact_sheet
    from beit_pretrain.data.write.index_existing import index_shards
    from beit_pretrain.data.write.make_shards import make_shards

    if cfg.action == "make":
        if not cfg.out:
            raise UserError("out is missing: the folder for the shards, such as out=data/mine")
        names = {*EncodeSettings.model_fields, "labels", "split", "num_workers"}
        settings = {name: value for name, value in to_dict(cfg).items() if name in names}
        for folder in make_shards(cfg.src, cfg.out, **settings):
            print(f"made {folder}\n{summary(folder)}")
        return
    if cfg.action not in ("index", "verify", "show"):
        raise UserError(f"shards {cfg.action}: there are make, index, verify and show")
    remote = {name: getattr(cfg, name) for name in RemoteOptions.model_fields}
    access = SourceSettings(image_key=cfg.image_key, label_key=cfg.label_key, **remote)
    if cfg.action == "index":
        if cfg.labels.file_column or cfg.labels.class_column:
            raise UserError("shards index takes a file of class names, a line each: labels.path= alone")
        how = (cfg.num_workers, cfg.image_key or (), cfg.split or "train", access)
        folder = index_shards(cfg.src, cfg.out, cfg.labels.path, *how)
        print(f"indexed {folder}\n{summary(folder)}")
        return
    if not isinstance(cfg.src, str):
        raise UserError(f"shards {cfg.action} takes one source as src=, not a list; give one after the other")
    ours = not is_remote(cfg.src) and (expand_home(cfg.src) / MANIFEST).is_file()
    if cfg.action == "verify" and ours:
        problems = verify_shards(cfg.src, num_workers=cfg.num_workers)
    else:
        reader = ShardReader(cfg.src, access, cfg.split or "train")
    if cfg.action == "show":
        print(summary(cfg.src) if ours else reader.folders[0].description())
        if not (cfg.out or ours):
            raise UserError(f"out is missing: the picture, such as out=sheet.png; {cfg.src} is no folder of shards")
        sheet = Path(cfg.out or Path(cfg.src) / "contact-sheet.png")
        contact_sheet(reader, sheet)
        print(f"wrote {sheet}")
        return
    if not ours:
        print(reader.folders[0].description())
        problems = faults(reader, num_workers=cfg.num_workers)
    if problems:
        print("\n".join(problems))
        raise UserError(f"{cfg.src}: {len(problems)} problem(s)")
    print(f"{cfg.src}: fine")
    if ours and (left_out := read_manifest(cfg.src).get("left_out")):
        print(left_out_summary(left_out))
