"""Training steps of other implementations: the authors' release written out plainly, timm, transformers.

Each takes normalised images, a mask and the tokens of the masked patches, and gives the loss of the same objective.
Shapes as in models/backbone.py.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from torch import Tensor, nn

from beit_pretrain.benchmarks.inputs import Batch, Bench
from beit_pretrain.errors import UserError
from beit_pretrain.models.backbone import MaskedImageModel
from beit_pretrain.models.checkpoints.hf_config import HFConfig
from beit_pretrain.tokenizers.tokenizer import OpenAITokenizer

SAME = ("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "init_values", "drop_path_rate")


class PlainModel(nn.Module):
    """timm's `Beit` with mask token, token head and our weights, run in full, as in the release (modeling_pretrain.py).

    Unlike there, `as_timm`: attention by torch's scaled_dot_product_attention, and the head on all patches.
    """

    def __init__(self, ours: MaskedImageModel, as_timm: bool = False):
        super().__init__()
        config, self.all_patches = ours.config, as_timm
        self.body = Beit(
            img_size=config["image_size"],
            num_classes=0,
            global_pool="",
            use_shared_rel_pos_bias=config["rel_pos_bias"] == "shared",
            use_rel_pos_bias=config["rel_pos_bias"] == "per_layer",
            use_abs_pos_emb=config["abs_pos_emb"],
            **{name: config[name] for name in SAME},
        )
        block: Any
        for block in self.body.blocks:
            block.attn.fused_attn = as_timm
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config["embed_dim"]))
        self.lm_head = nn.Linear(config["embed_dim"], config["vocab_size"])
        own = ("mask_token", "lm_head")
        self.load_state_dict({n if n.startswith(own) else f"body.{n}": t for n, t in ours.state_dict().items()})

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
    """`BeitForMaskedImageModeling` of Hugging Face, of our architecture; `attention` is "sdpa" or "eager"."""

    def __init__(self, ours: MaskedImageModel, attention: str = "sdpa"):
        super().__init__()
        if find_spec("transformers") is None:
            raise UserError("transformers is not installed: pip install transformers, or other bench.variants=")
        from transformers import BeitConfig, BeitForMaskedImageModeling

        self.model: Any = BeitForMaskedImageModeling(BeitConfig.from_dict(HFConfig.of_network(ours).to_dict()))
        self.model.set_attn_implementation(attention)

    def forward(self, image_BCHW: Tensor, mask_BN: Tensor, token_M: Tensor) -> Tensor:
        """Mean cross-entropy of the masked patches."""
        loss: Tensor = self.model(image_BCHW, bool_masked_pos=mask_BN, labels=token_M).loss
        return loss


def peer_step(bench: Bench, name: str) -> Callable[[Batch], object]:
    """The training step of a peer: its own network, our optimiser, torch's gradient clipping."""
    model: nn.Module
    if name.startswith("transformers"):
        model = Transformers(bench.model, "eager" if name == "transformers_eager" else "sdpa")
    else:
        model = PlainModel(bench.model, as_timm=name == "timm")
    optimizer = bench.optimizer(model.to(bench.device).train())
    # As a user would: with graph breaks where there are some, and shapes that may change.
    loss_of: Any = torch.compile(model) if name == "reference_compiled" else model
    encode = packages_encoder(bench) if name == "reference_tokenizer" else None

    def step(batch: Batch) -> None:
        mask = batch.ours["mask"]
        token_M = batch.token_M if encode is None else encode(batch.token_image)[mask]
        learn(bench, loss_of, optimizer, batch.image, mask, token_M)

    return step


def learn(
    bench: Bench, loss_of: Any, optimizer: torch.optim.Optimizer, image: Tensor, mask: Tensor, token_M: Tensor
) -> Tensor:
    """One optimiser step of a peer; returns its loss."""
    with bench.precision():
        loss: Tensor = loss_of(image, mask, token_M)
    loss.backward()
    if bench.module.optim.clip is not None:
        nn.utils.clip_grad_norm_(loss_of.parameters(), bench.module.optim.clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def packages_encoder(bench: Bench) -> Callable[[Tensor], Tensor]:
    """Encoder of the `dall_e` package, as in the release; another kind of tokenizer encodes by itself."""
    if not isinstance(bench.tokenizer, OpenAITokenizer):
        return bench.tokenizer.encode
    from dall_e import map_pixels

    encoder = bench.tokenizer.encoder.to(bench.device)

    @torch.no_grad()
    def encode(image: Tensor) -> Tensor:
        with torch.autocast(bench.device.type, enabled=False):
            return encoder(map_pixels(image)).argmax(1).flatten(1)

    return encode
