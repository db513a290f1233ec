"""The verb `bench`: what is measured about this project, one module an action.

Every action prints a table for people and, as its last line, one JSON object for programs.
"""

from __future__ import annotations

import importlib

from omegaconf import DictConfig

from beit_pretrain.errors import UserError

ACTIONS = {  # action -> module:function, taking the composed config
    "views": "beit_pretrain.benchmarks.views:bench_views",
    "loader": "beit_pretrain.benchmarks.loader:bench_loader",
    "step": "beit_pretrain.benchmarks.step:bench_step",
    "loop": "beit_pretrain.benchmarks.loop:bench_loop",
    "attention": "beit_pretrain.benchmarks.attention:bench_attention",
    "memory": "beit_pretrain.benchmarks.memory:bench_memory",
    "all": "beit_pretrain.benchmarks.page:bench_all",
    "gpu": "beit_pretrain.benchmarks.gpu.runner:bench_gpu",
    "page": "beit_pretrain.benchmarks.gpu.page:bench_page",
}


def bench(cfg: DictConfig) -> None:
    """Measure what `cfg.action` names."""
    if cfg.action not in ACTIONS:
        raise UserError(f"bench {cfg.action}: there are {', '.join(ACTIONS)}")
    if "src" in cfg and cfg.src is not None and not isinstance(cfg.src, str):
        raise UserError("bench takes one src=: a folder, a tar or a shard folder")
    if "trainer" in cfg and cfg.action not in ("gpu", "page"):  # these import nothing heavy
        importlib.import_module("beit_pretrain.benchmarks.inputs").check_settings(cfg)
        cfg.trainer.devices = cfg.trainer.num_nodes = 1  # auto would be all GPUs to Lightning
    module, function = ACTIONS[cfg.action].split(":")
    getattr(importlib.import_module(module), function)(cfg)
