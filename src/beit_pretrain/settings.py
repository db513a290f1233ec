"""What values the settings of the command line may have: checked before anything is read or written.

Hydra knows which settings exist, not what they may be. Here stands a rule for each, for all verbs together; what a rule
refuses gets one line. Relations between settings are checked where they matter (patches that divide an image, say).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from typing import Any, TypeGuard

from beit_pretrain.errors import UserError

Rule = tuple[str, Callable[[Any], bool]]


def whole(low: int, high: float = 2**63) -> Rule:
    """A whole number from `low` to below `high`."""
    text = f"a whole number of at least {low}" + (f" and at most {high - 1}" if high < 2**63 else "")
    return text, lambda v: type(v) is int and low <= v < high


def number(low: float, high: float = math.inf, above: bool = False) -> Rule:
    """A finite number from `low` (or above it) to `high`."""
    text = "a number" if low == -math.inf else f"a number {'above' if above else 'of at least'} {low:g}"
    text += f" and at most {high:g}" if high < math.inf else ""
    return text, lambda v: is_number(v) and (low < v if above else low <= v) and v <= high


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number, and no truth value."""
    return type(value) in (int, float) and math.isfinite(value)


def numbers(count: int | None, rule: Rule) -> Rule:
    """A list of so many values of a rule."""
    text, fits = rule
    how_many = f"a list of {count}, each" if count else "a list, each"
    return (
        f"{how_many} {text}",
        lambda v: isinstance(v, list) and len(v) == (count or len(v)) and len(v) > 0 and all(map(fits, v)),
    )


def rising(rule: Rule) -> Rule:
    """A pair of values of a rule, the second not below the first."""
    text, fits = numbers(2, rule)
    return f"{text}, the second not below the first", lambda v: fits(v) and v[0] <= v[1]


def ascending(rule: Rule) -> Rule:
    """A pair of values of a rule, the second above the first."""
    text, fits = numbers(2, rule)
    return f"{text}, the second above the first", lambda v: fits(v) and v[0] < v[1]


def optional(rule: Rule) -> Rule:
    """null, or a value of the rule."""
    text, fits = rule
    return f"null or {text}", lambda v: v is None or fits(v)


def one_of(*words: str | bool | None) -> Rule:
    """One of some words."""
    said = {None: "null", True: "true", False: "false"}
    text = ", ".join(said[w] if w is None or isinstance(w, bool) else w for w in words)
    return f"one of {text}", lambda v: any(v is w or (isinstance(v, str) and v == w) for w in words)


POSITIVE = number(0, above=True)
SHARE = number(0, 1)
TEXT: Rule = ("a text", lambda v: isinstance(v, str) and v != "")
SWITCH: Rule = ("true or false", lambda v: isinstance(v, bool))
TEXTS = numbers(None, TEXT)
PATHS: Rule = ("a path, or a list of paths", lambda v: TEXT[1](v) or TEXTS[1](v))

# Settings that are paths or names: a folder called 2024 is not a number.
NAMES = (
    *("src", "out", "run", "name", "run_dir", "split", "init_from", "labels", "tokenizer.path"),
    *("data.train", "data.val", "data.cache_dir", "data.tokens", "data.val_tokens", "cache_dir"),
)
ADDRESS: Rule = (
    "an address that starts with http://, https:// or file:///",
    lambda v: isinstance(v, str) and re.match(r"https?://[^/]|file:///", v) is not None,
)

# Of the pre-training's views; `tokenize` has them too.
VIEWS: dict[str, Rule] = {
    "token_image_size": optional(whole(1, 2**16)),
    "scale": rising(number(0, 1, above=True)),
    "ratio": rising(POSITIVE),
    "flip": SHARE,
    "jitter": numbers(3, number(0)),
    "exact": SWITCH,
    "channels": ("1, 3 or 4", lambda v: type(v) is int and v in (1, 3, 4)),
}
DEVICES: Rule = (
    "auto, a number of devices, or a list of their numbers",
    lambda v: v == "auto" or (type(v) is int and (v == -1 or v > 0)) or numbers(None, whole(0))[1](v),
)

VARIANTS = (
    *("ours", "ours_tokenizer", "ours_cached", "reference", "reference_compiled", "reference_tokenizer"),
    *("transformers", "transformers_eager", "timm"),
)

RULES: dict[str, Rule] = {
    **{name: optional(TEXT) for name in NAMES},
    "src": PATHS,
    "held_out": optional(PATHS),
    "data.train": PATHS,
    "data.val": optional(PATHS),
    **{name: optional(PATHS) for name in ("data.tokens", "data.val_tokens")},
    "data.weights": optional(numbers(None, POSITIVE)),
    "data.max_corrupt_fraction": SHARE,
    **{f"{place}cache_gb": number(0, 10**9, above=True) for place in ("data.", "")},
    **{f"{place}retries": whole(0, 101) for place in ("data.", "")},
    "data.timeout": number(0, 86_400, above=True),
    "seed": whole(0, 2**32),
    "resume": one_of("auto", "never"),
    "epochs": optional(POSITIVE),
    "steps": optional(whole(1)),
    **{name: whole(1) for name in ("global_batch_size", "batch_size", "log_every", "val_every", "save_every")},
    "threads": optional(whole(1)),
    "compile": one_of("auto", True, False, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "attention": one_of("auto", "sdpa", "triton"),
    **dict.fromkeys(("device_prefetch", "profile", "deterministic"), SWITCH),
    **dict.fromkeys(("save_minutes", "val_minutes"), optional(POSITIVE)),
    "gradient_compression": one_of(None, "bf16"),
    "optimize_ddp": SWITCH,
    "keep_every": optional(whole(1)),
    "max_nonfinite_steps": whole(1),
    "preflight": one_of(True, "only"),
    "timeout_minutes": number(0, 100_000, above=True),
    "jobs": whole(1),
    "trainer.devices": DEVICES,
    "trainer.num_nodes": ("auto or a whole number of at least 1", lambda v: v == "auto" or (type(v) is int and v > 0)),
    "trainer.strategy": TEXT,
    "trainer.accelerator": TEXT,
    "image_size": optional(whole(1, 2**16)),
    "to": one_of("unilm", "timm", "onnx", "hf"),
    "patch_size": optional(whole(1, 2**16)),
    "mean": optional(numbers(None, number(-math.inf))),
    "std": optional(numbers(None, POSITIVE)),
    "from_scratch": SWITCH,
    "pictures": whole(0),
    **{f"knn.{name}": whole(1) for name in ("bank", "queries", "k")},
    # probe
    "knn.ks": numbers(None, whole(1)),
    "knn.temperatures": numbers(None, POSITIVE),
    "linear.pool": one_of("cls_avg", "avg", "cls"),
    **{f"linear.{name}": whole(1) for name in ("epochs", "batch")},
    "linear.lr": POSITIVE,
    "linear.weight_decay": number(0),
    "keep_features": SWITCH,
    "train_images": optional(whole(1)),
    "optim.lr": POSITIVE,
    **{f"optim.{name}": number(0) for name in ("min_lr", "weight_decay", "eps")},
    "optim.warmup_epochs": optional(number(0)),
    "optim.warmup_steps": whole(0),
    "optim.betas": numbers(2, ("a number of at least 0 and below 1", lambda v: is_number(v) and 0 <= v < 1)),
    "optim.clip": optional(POSITIVE),
    "optim.layer_decay": optional(number(0, 1, above=True)),
    "optim.schedule": one_of("cosine", "poly"),
    "optim.warmup_start": SHARE,
    "decoder.layers": optional(numbers(4, whole(0))),
    "decoder.channels": optional(whole(1, 2**16)),
    "decoder.pool_scales": numbers(None, whole(1, 2**10)),
    "decoder.aux_channels": optional(whole(1, 2**16)),
    "num_classes": optional(whole(2, 256)),
    "test.stride": optional(number(0, 1, above=True)),  # null in validate: as in the run
    "test.scales": optional(numbers(None, number(0, 16, above=True))),
    "test.flip": optional(SWITCH),
    **{f"model.{name}": whole(1, 2**20) for name in ("embed_dim", "depth", "num_heads", "width", "code_dim")},
    "model.vocab_size": whole(2, 2**31),
    "model.blocks": whole(0, 2**10),
    "model.drop_path_rate": ("a number of at least 0 and below 1", lambda v: is_number(v) and 0 <= v < 1),
    "model.init_values": optional(POSITIVE),
    "model.abs_pos_emb": optional(SWITCH),
    "model.rel_pos_bias": optional(one_of("shared", "per_layer", "none")),
    "model.pool": optional(one_of("avg", "token")),
    "model.size": optional(TEXT),
    "new_head": SWITCH,
    "activation_checkpointing": SWITCH,
    "ema": optional(("a number above 0 and below 1", lambda v: is_number(v) and 0 < v < 1)),
    "early_stopping": optional(whole(1)),
    "probe.layer": optional(whole(1)),
    "probe.pool": one_of("cls_avg", "avg", "cls"),
    "recipe.global_batch_size": whole(1),
    "recipe.lr": POSITIVE,
    "relaxation.temperature_end": number(0, 1, above=True),
    "relaxation.anneal": number(0, 1, above=True),
    "relaxation.kl_weight": number(0),
    "relaxation.usage_weight": number(0),
    "regularisation.label_smoothing": SHARE,
    "regularisation.mixup": number(0),
    "regularisation.cutmix": number(0),
    "regularisation.erasing": SHARE,
    "mask.max_patches": whole(1),
    "mask.min_block": whole(1),
    "mask.min_aspect": number(0, 1, above=True),
    **{f"data.{name}": rule for name, rule in VIEWS.items()},
    "data.num_workers": whole(0),
    "data.shuffle_block_size": whole(1),
    "data.shuffle_streams": whole(1, 4097),
    "data.val_batch": whole(1),
    "data.val_images": optional(whole(1)),
    "data.labels_per_class": optional(whole(1)),
    "data.auto_augment": optional(TEXT),
    "data.reduce_labels": SWITCH,
    "data.resize": rising(POSITIVE),
    "data.max_share": number(0, 1, above=True),
    "data.distort": SWITCH,
    "data.crop_ratio": optional(number(0, 1, above=True)),
    "logger.kind": one_of("csv", "wandb"),
    "logger.mode": one_of(None, "online", "offline", "disabled", "shared"),
    # tokenize
    **VIEWS,
    "jitter": optional(VIEWS["jitter"]),
    "views": whole(1, 1025),
    "part": optional(
        ("of the form 3/16", lambda v: isinstance(v, str) and re.fullmatch(r"\d{1,6}/\d{1,6}", v) is not None)
    ),
    "accelerator": one_of("auto", "cpu", "cuda"),
    # show
    "what": optional(TEXT),
    "runs": optional(PATHS),
    "photos": optional(TEXT),
    **{name: optional(numbers(None, whole(1))) for name in ("layers", "heads")},
    "patches": optional(numbers(None, numbers(2, whole(0)))),
    "metrics": optional(TEXTS),
    # fetch, shards, predict, demo, compare
    "map_batch_size": whole(1),
    "precision": TEXT,
    "probe_images": whole(1),
    "encoder": ADDRESS,
    "decoder": ADDRESS,
    "timeout": number(0, 86_400, above=True),
    "attempts": whole(1),
    "val": number(0, 1),
    "samples_per_shard": whole(1),
    "window": optional(ascending(number(-math.inf))),
    "percentiles": ascending(number(0, 100)),
    "resize": optional(whole(1)),
    "quality": whole(1, 101),
    "num_workers": optional(whole(0)),
    "images": whole(1),
    "size": whole(16),
    "top": whole(1),
    "val_images": whole(1),
    "labels_per_class": whole(1),
    "max_labelled": whole(1),
    "seeds": whole(1),
    # bench
    "positions": optional(whole(1)),
    "token_image_size": optional(whole(1, 2**16)),
    **{f"{place}rounds": whole(1) for place in ("", "bench.")},
    "bench.warm_up": whole(0),
    "bench.steps": optional(whole(1)),
    "bench.clock": one_of("wall", "cpu"),
    "bench.variants": (
        f"a list of some of {', '.join(VARIANTS)}",
        lambda v: isinstance(v, list) and len(v) > 0 and set(v) <= set(VARIANTS),
    ),
    "bench.memory_gb": optional(POSITIVE),
    "bench.src": optional(TEXT),
    "bench.out": TEXT,
    "device": one_of("auto", "cpu"),
    "bench.seconds": POSITIVE,
    "bench.only": optional(("stages, such as base or base,large", lambda v: TEXT[1](v) or TEXTS[1](v))),
    "bench.tiny": SWITCH,
    "bench.scratch": optional(TEXT),
    **{f"steps.{name}": whole(1) for name in ("tokenizer", "pretrain", "finetune")},
}


def as_name(value: Any) -> Any:
    """A number that is a name as a text; so too in a list of names."""
    if isinstance(value, list):
        return [as_name(item) for item in value]
    return str(value) if type(value) in (int, float) else value


def check(settings: dict[str, Any], prefix: str = "", spared: Collection[str] = ()) -> None:
    """Raise UserError for the first setting that breaks its rule; numbers that are names become texts, in place.

    The settings `spared` are not looked at.
    """
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            check(value, f"{name}.", spared)
            continue
        if name in spared:
            continue
        if name in NAMES:
            settings[key] = value = as_name(value)
        if name in RULES and not RULES[name][1](value):
            rule = RULES[name][0]
            if type(value) is int and value >= 2**63 and "at most" not in rule:
                rule += " and below 2^63"
            raise UserError(f"{name} must be {rule}, got {'null' if value is None else value!r}")
