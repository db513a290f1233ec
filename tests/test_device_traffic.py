"""A training step never synchronizes with the GPU: no blocking reads or copies, counted on fake tensors.

A fake tensor has a shape, a type and a device (a GPU that need not exist), and no contents: to read one is an error.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from dall_e.encoder import Encoder
from tiny import MIM, SIZE
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from beit_pretrain.data.dataset import with_first_position
from beit_pretrain.engine.nonfinite_guard import NonFiniteGuard
from beit_pretrain.engine.settings import OptimSettings
from beit_pretrain.models.backbone import Classifier, MaskedImageModel
from beit_pretrain.tasks.finetune import Finetuning, MixConfig
from beit_pretrain.tasks.pretrain import Pretraining
from beit_pretrain.tokenizers.tokenizer import OpenAITokenizer
from beit_pretrain.transforms import jitter
from beit_pretrain.transforms.mean_color_grid import SIDE

GPU = torch.device("cuda", 0)
BATCH, HALF = 4, (0.5, 0.5, 0.5)


class Transfers(TorchDispatchMode):
    """Records blocking copies between host and device."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default:
            crossing = args[0].device.type != out.device.type
            waits = not (kwargs or {}).get("non_blocking")
        elif function is torch.ops.aten.copy_.default:
            crossing, waits = args[0].device.type != args[1].device.type, not (len(args) > 2 and args[2])
        else:
            return out
        if crossing and waits:
            self.found.append(f"{function} of {tuple(args[-1 if function.name() == 'aten::copy_' else 0].shape)}")
        return out


@pytest.fixture(autouse=True)
def constants_are_kept(monkeypatch):
    """As those of a real GPU are; these are fake, and not kept after the test."""
    monkeypatch.setattr(jitter, "_CONSTANTS", {})
    monkeypatch.setattr(jitter, "_may_be_kept", lambda like: True)


FAKE = FakeTensorMode(allow_non_fake_inputs=True)


def moved(network):
    """The network with fake parameters on the GPU; call it under `FAKE`."""
    for part in network.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = torch.nn.Parameter(torch.empty_like(value, device=GPU))
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = torch.empty_like(value, device=GPU)
    return network


def with_trainer(module):
    reduce = SimpleNamespace(reduce=lambda value, **_: value)
    module._trainer = SimpleNamespace(
        accumulate_grad_batches=1, world_size=1, strategy=reduce, precision_plugin=None, global_step=3, max_steps=10
    )
    module._device = GPU
    module.guard = NonFiniteGuard(None, 20, BATCH)
    return module


def pretraining_batch() -> dict[str, torch.Tensor]:
    return {
        "image": torch.zeros(BATCH, 3, 32, 32, dtype=torch.uint8),
        "token_image": torch.zeros(BATCH, 3, 32, 32, dtype=torch.uint8),
        "jitter_factors": torch.ones(BATCH, 3),
        "jitter_order": torch.zeros(BATCH, 3, dtype=torch.long),
        "jitter_tiles": torch.zeros(BATCH, SIDE**2, 3, dtype=torch.uint8),
        "mask": torch.zeros(BATCH, 16, dtype=torch.bool),
        "mask_index": torch.zeros(BATCH, 6, dtype=torch.long),
        "position": torch.arange(BATCH),
    }


def steps_taken(module, batch, count: int = 2) -> list[str]:
    """The blocking copies in the last of some optimizer steps, taken as Lightning does."""
    optimizer = torch.optim.SGD(module.model.parameters(), lr=0.1)  # AdamW's fused kernel knows no fake tensors
    for _ in range(count):  # in the first one constants come to the device
        given = with_first_position(batch)
        with FAKE:
            there = {k: v.to(GPU, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
            with Transfers() as transfers:
                module.on_train_batch_start(there, 0)
                module.training_step(there, 0)
                for parameter in module.model.parameters():  # autograd itself wants a real GPU
                    parameter.grad = torch.zeros_like(parameter)
                module.configure_gradient_clipping(optimizer)
    return transfers.found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_pretraining_step_has_no_device_sync(checkpointing):
    network = MaskedImageModel(**MIM | {"vocab_size": 512}, drop_path_rate=0.1)
    network.set_grad_checkpointing(checkpointing)
    tokenizer = OpenAITokenizer.of(Encoder(n_hid=64, n_blk_per_group=1, vocab_size=512))
    with FAKE:
        module = Pretraining(moved(network), tokenizer.to(GPU), OptimSettings(lr=1e-3, clip=1.0), HALF, HALF)
        module._tokens_V = torch.zeros(512, device=GPU)
    with_trainer(module)
    assert steps_taken(module, pretraining_batch()) == []


def test_finetuning_step_has_no_device_sync(monkeypatch):
    # It asks the driver, and reads nothing.
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    network = Classifier(10, **SIZE)
    regularisation = MixConfig(mixup=0.8, cutmix=1.0)
    with FAKE:
        module = Finetuning(moved(network), OptimSettings(lr=1e-3), regularisation, HALF, HALF)
    with_trainer(module)
    batch = {
        "image": torch.zeros(BATCH, 3, 32, 32, dtype=torch.uint8),
        "label": torch.zeros(BATCH, dtype=torch.long),
        "position": torch.arange(BATCH),
    }
    assert steps_taken(module, batch) == []


def test_device_sync_is_detected():
    with FAKE, Transfers() as transfers:
        image = torch.zeros(2, 3, device=GPU)
        image.new_tensor([1.0, 2.0, 3.0])
        torch.zeros(3).to(GPU, non_blocking=True)
        image.cpu()
        torch.zeros(2, 3).copy_(image)
    assert len(transfers.found) == 3, transfers.found
    with FAKE, pytest.raises(DataDependentOutputException):
        float(image.sum())
