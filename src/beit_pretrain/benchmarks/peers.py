"""Other people's training step, for comparison: the authors' release written out plainly, timm, transformers.

Each takes normalised images, a mask and the tokens of the masked patches, and gives the loss of the same objective; so
all of them learn the same from a batch. Shapes as in models/backbone.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models.beit import Beit
from torch import Tensor, nn

from beit_pretrain.benchmarks.inputs import Batch, Bench, configured
from beit_pretrain.errors import UserError
from beit_pretrain.models.backbone import Architecture
from beit_pretrain.tokenizers.tokenizer import OpenAITokenizer

Step = Callable[[Tensor, Tensor, Tensor], None]  # of normalised images, a mask, the masked patches' tokens


class PlainModel(nn.Module):
    """timm's `Beit` with mask token and token head, run in full, as in the release (modeling_pretrain.py).

    Args:
        architecture: of the network.
        vocab_size: V.
        fused: attention by torch's scaled_dot_product_attention; else scores, added bias, softmax, product, as there.
        all_patches: the head on all patches, of which the masked ones are then taken; else on these alone, as there.
    """

    def __init__(self, architecture: Architecture, vocab_size: int, fused: bool, all_patches: bool):
        super().__init__()
        size = architecture["image_size"]
        self.body = Beit(
            img_size=size if isinstance(size, int) else (size[0], size[1]),
            patch_size=architecture["patch_size"],
            in_chans=architecture["in_chans"],
            num_classes=0,
            global_pool="",
            embed_dim=architecture["embed_dim"],
            depth=architecture["depth"],
            num_heads=architecture["num_heads"],
            init_values=architecture["init_values"],
            drop_path_rate=architecture["drop_path_rate"],
            use_shared_rel_pos_bias=architecture["rel_pos_bias"] == "shared",
            use_rel_pos_bias=architecture["rel_pos_bias"] == "per_layer",
            use_abs_pos_emb=architecture["abs_pos_emb"],
        )
        block: Any
        for block in self.body.blocks:
            block.attn.fused_attn = fused
        self.mask_token = nn.Parameter(torch.zeros(1, 1, architecture["embed_dim"]))
        self.lm_head = nn.Linear(architecture["embed_dim"], vocab_size)
        self.all_patches = all_patches
        trunc_normal_(self.mask_token, std=0.02)

    def forward(self, image_BCHW: Tensor, mask_BN: Tensor, token_M: Tensor) -> Tensor:
        """Mean cross-entropy of the masked patches."""
        body: Any = self.body
        x = body.patch_embed(image_BCHW)
        weight = mask_BN.unsqueeze(-1).type_as(self.mask_token)
        x = x * (1 - weight) + self.mask_token.expand(x.shape[0], x.shape[1], -1) * weight
        x = torch.cat([body.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        if body.pos_embed is not None:
            x = x + body.pos_embed
        bias = body.rel_pos_bias() if body.rel_pos_bias is not None else None
        for block in body.blocks:
            x = block(x, shared_rel_pos_bias=bias)
        x = body.norm(x)[:, 1:]
        logits = self.lm_head(x)[mask_BN] if self.all_patches else self.lm_head(x[mask_BN])
        return F.cross_entropy(logits, token_M)


class Transformers(nn.Module):
    """`BeitForMaskedImageModeling` of Hugging Face. Raises UserError where transformers is not installed.

    Args:
        attention: "sdpa" or "eager".
    """

    def __init__(self, architecture: Architecture, vocab_size: int, attention: str = "sdpa"):
        super().__init__()
        try:
            from transformers import BeitConfig, BeitForMaskedImageModeling
        except ImportError:
            raise UserError(
                "bench.peers: transformers is not installed; leave it out, or: pip install transformers"
            ) from None
        config = BeitConfig(
            vocab_size=vocab_size,
            hidden_size=architecture["embed_dim"],
            num_hidden_layers=architecture["depth"],
            num_attention_heads=architecture["num_heads"],
            intermediate_size=int(architecture["embed_dim"] * architecture["mlp_ratio"]),
            layer_norm_eps=1e-6,
            image_size=architecture["image_size"],
            patch_size=architecture["patch_size"],
            num_channels=architecture["in_chans"],
            use_mask_token=True,
            use_absolute_position_embeddings=architecture["abs_pos_emb"],
            use_relative_position_bias=architecture["rel_pos_bias"] == "per_layer",
            use_shared_relative_position_bias=architecture["rel_pos_bias"] == "shared",
            layer_scale_init_value=architecture["init_values"] or 0.0,
            drop_path_rate=architecture["drop_path_rate"],
        )
        self.model: Any = BeitForMaskedImageModeling(config)
        self.model.set_attn_implementation(attention)

    def forward(self, image_BCHW: Tensor, mask_BN: Tensor, token_M: Tensor) -> Tensor:
        """Mean cross-entropy of the masked patches."""
        loss: Tensor = self.model(image_BCHW, bool_masked_pos=mask_BN, labels=token_M).loss
        return loss


def peer_steps(bench: Bench, names: list[str]) -> dict[str, Callable[[Batch], None]]:
    """The other variants among `names`: the same optimiser, clipping by torch."""
    architecture, vocab, clip = bench.architecture, bench.tokenizer.vocab_size, bench.module.optim.clip

    def stepping(model: nn.Module, compiled: bool = False) -> Step:
        optimizer = configured(model.to(bench.device).train(), bench.module.optim)
        # As a user would: with graph breaks where there are some, and shapes that may change.
        loss_of: Any = torch.compile(model) if compiled else model

        def step(image: Tensor, mask: Tensor, token_M: Tensor) -> None:
            with bench.precision():
                loss = loss_of(image, mask, token_M)
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()

        return step

    variants: dict[str, Callable[[Batch], None]] = {}
    if {"reference", "reference_tokenizer"} & set(names):
        plain = stepping(PlainModel(architecture, vocab, fused=False, all_patches=False))
        encode = packages_encoder(bench)
        variants["reference"] = on_images(plain)
        variants["reference_tokenizer"] = lambda batch: plain(
            batch.image, batch.ours["mask"], encode(batch.token_image)[batch.ours["mask"]]
        )
    if "reference_compiled" in names:
        compiled = stepping(PlainModel(architecture, vocab, fused=False, all_patches=False), compiled=True)
        variants["reference_compiled"] = on_images(compiled)
    if "timm" in names:
        timm = stepping(PlainModel(architecture, vocab, fused=True, all_patches=True))
        variants["timm"] = on_images(timm)
    for attention, name in (("sdpa", "transformers"), ("eager", "transformers_eager")):
        if name in names:  # one network each: two of them cost memory, not time
            variants[name] = on_images(stepping(Transformers(architecture, vocab, attention)))
    return {name: variant for name, variant in variants.items() if name in names}


def on_images(step: Step) -> Callable[[Batch], None]:
    return lambda batch: step(batch.image, batch.ours["mask"], batch.token_M)


def packages_encoder(bench: Bench) -> Callable[[Tensor], Tensor]:
    """Tokens (B, N) as the release computes them; for a tokenizer of another kind, its own way."""
    if not isinstance(bench.tokenizer, OpenAITokenizer):
        return bench.tokenizer.encode
    from dall_e import map_pixels

    encoder = bench.tokenizer.encoder.to(bench.device)

    @torch.no_grad()
    def encode(image: Tensor) -> Tensor:
        with torch.autocast(bench.device.type, enabled=False):
            return encoder(map_pixels(image)).argmax(1).flatten(1)

    return encode
