"""Execution of a step on a GPU: compiled, as CUDA graph, prefetched, without device sync, deterministic."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from beit_pretrain.engine.device_prefetch import DevicePrefetcher
from beit_pretrain.engine.nonfinite_guard import NonFiniteGuard
from beit_pretrain.engine.optim import clip_gradients, configure
from beit_pretrain.engine.speed import make_deterministic
from beit_pretrain.models.backbone import MaskedImageModel
from beit_pretrain.models.checkpoints.files import load_exactly
from gpu.test_numbers import assert_near, batch_of, error, loss_and_gradients, moved, pretraining


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet():
    torch._dynamo.reset()
    counters.clear()


def optimiser(module):
    return configure(module.model, module.optim, total_steps=100)["optimizer"]


def steps(module, batches, optimizer=None, half: bool = False) -> list[torch.Tensor]:
    """The losses of optimizer steps as in a run: views, tokens, loss, gradients, clip, fused AdamW."""
    optimizer = optimizer or optimiser(module)
    losses = []
    for number, batch in enumerate(batches):
        module.on_train_batch_start(batch, number)
        with torch.autocast(module.device.type, torch.bfloat16, enabled=half):
            view, tokens = module.prepare(batch)
            objective = module.maybe_compile(module.objective)
            found = objective(view, batch["mask"], batch["mask_index"], tokens, module.drop_path_noise(batch))
        slots = batch["mask_index"].numel()
        (found.loss_sum / slots).backward()
        clip_gradients(module.model.parameters(), module.optim.clip, slots / found.masked)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((found.loss_sum / found.masked).detach().clone())  # a CUDA graph overwrites its own
    return losses


def batches_of(device, count: int, tokens: bool = True) -> list[dict]:
    """Batches with tokens, or without, so that the tokenizer computes them."""
    made = [moved(batch_of(seed=seed), device) for seed in range(count)]
    return made if tokens else [{k: v for k, v in batch.items() if k != "tokens"} for batch in made]


def weights(module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.model.parameters()])


@pytest.mark.parametrize("bias", ["shared", "per_layer"])
def test_compiled_loss_and_gradients_equal_eager(device, bias):
    batch = moved(batch_of(), device)
    module = pretraining(device, rel_pos_bias=bias)
    exact = loss_and_gradients(module, batch)
    module.compile_mode = "default"
    assert_near(loss_and_gradients(module, batch), exact, 1e-5, 1e-4)


def test_compiled_bf16_gradients_are_close(device):
    batch = moved(batch_of(), device)
    module = pretraining(device)
    exact = loss_and_gradients(module, batch)
    module.compile_mode = "default"
    assert_near(loss_and_gradients(module, batch, half=True), exact, 2e-3, 0.03)


def test_three_steps_are_compiled_once(device):
    module = pretraining(device)
    module.compile_mode = "default"
    steps(module, batches_of(device, 3, tokens=device.type == "cpu"))  # a CPU's encoder is not compiled
    assert counters["stats"]["unique_graphs"] == 2  # the views with their tokens, and the objective
    assert sum(counters["graph_break"].values()) == 0, counters["graph_break"]


def test_compiled_tokens_equal_eager(device):
    module = pretraining(device)
    batch = batches_of(device, 1, tokens=False)[0]
    view, tokens = module.image_and_tokens(batch)
    module.compile_mode = "default"
    found, other = module.prepare(batch)
    torch.testing.assert_close(found, view, atol=2 / 255, rtol=0)
    assert (tokens != other).float().mean() < 0.02


def test_step_has_no_device_sync(cuda):
    module = pretraining(cuda, drop_path_rate=0.1)
    optimizer, batches = optimiser(module), batches_of(cuda, 3, tokens=False)
    module.guard = guard = NonFiniteGuard(None, 20, 8)
    steps(module, batches[:1], optimizer)  # warm-up
    guard.check(torch.ones((), device=cuda), optimizer, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(3):
            on_host = {name: tensor.pin_memory() for name, tensor in batch_of(seed=number).items() if name != "tokens"}
            there = {name: tensor.to(cuda, non_blocking=True) for name, tensor in on_host.items()}
            steps(module, [there], optimizer, half=True)
            guard.check(torch.ones((), device=cuda), optimizer, number)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nonfinite_gradient_changes_nothing(device):
    module = pretraining(device)
    optimizer = optimiser(module)
    steps(module, batches_of(device, 2), optimizer)
    before = weights(module)
    moments = [{k: v.clone() for k, v in state.items()} for state in optimizer.state.values()]
    guard = NonFiniteGuard(None, 20, 8)
    for parameter in module.model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    skipped = guard.check(clip_gradients(module.model.parameters(), 1.0), optimizer, 2)
    optimizer.step()
    assert skipped.item() == 1
    assert torch.equal(weights(module), before)
    for state, kept in zip(optimizer.state.values(), moments, strict=True):
        assert all(torch.equal(state[name], kept[name]) for name in kept)
    for parameter in module.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert guard.check(clip_gradients(module.model.parameters(), 1.0), optimizer, 3).item() == 0
    optimizer.step()
    assert not torch.equal(weights(module), before)


def test_device_prefetch_gives_same_batches(device):
    on_host = [{k: v for k, v in batch_of(seed=n).items() if k != "tokens"} for n in range(4)]
    if device.type == "cuda":
        on_host = [{k: v.pin_memory() for k, v in batch.items()} for batch in on_host]
    module = pretraining(device)
    plain = [module.prepare(moved(batch, device)) for batch in on_host]
    prefetcher = DevicePrefetcher(on_host, module.prepare, device)
    for batch, (view, tokens) in zip(prefetcher, plain, strict=True):
        assert torch.equal(batch["view"], view)
        assert torch.equal(batch["tokens"], tokens)
        if device.type == "cuda":  # work that overlaps with preparing the next batch
            torch.randn(2048, 2048, device=device) @ torch.randn(2048, 2048, device=device)


def test_device_prefetch_gives_same_losses(device):
    on_host = [{k: v for k, v in batch_of(seed=n).items() if k != "tokens"} for n in range(4)]
    plain = pretraining(device)
    expected = steps(plain, [moved(batch, device) for batch in on_host])
    module = pretraining(device)
    losses = steps(module, DevicePrefetcher(on_host, module.prepare, device))
    assert torch.stack(losses).tolist() == pytest.approx(torch.stack(expected).tolist(), rel=1e-4)


def test_device_prefetch_overlaps_with_step(cuda):
    """A step begins while the next batch is still being prepared, which takes long here."""
    on_host = [{"image": torch.zeros(1, dtype=torch.uint8).pin_memory()} for _ in range(3)]
    made = []

    def prepare(batch):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        made.append(torch.cuda.current_stream().record_event())
        return batch["image"], batch["image"]

    for number, _ in enumerate(DevicePrefetcher(on_host, prepare, cuda), start=1):
        begun = torch.cuda.current_stream().record_event()
        begun.synchronize()
        assert made[number - 1].query()  # its own batch
        assert number == len(on_host) or not made[number].query()


def test_cuda_graphs_give_same_losses(cuda):
    """The graph of the views feeds the graph of the objective; every step overwrites both."""
    expected = steps(pretraining(cuda), batches_of(cuda, 6, tokens=False))
    module = pretraining(cuda)
    module.compile_mode = "reduce-overhead"
    losses = steps(module, batches_of(cuda, 6, tokens=False))
    assert torch.stack(losses).tolist() == pytest.approx(torch.stack(expected).tolist(), rel=5e-3)


def test_deterministic_steps_are_bit_identical(device):
    make_deterministic(device.type == "cuda")
    found = []
    for _ in range(2):
        module = pretraining(device, drop_path_rate=0.1)
        losses = steps(module, batches_of(device, 4, tokens=False), half=True)
        found.append((torch.stack(losses), weights(module)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_deterministic_compiled_steps_are_bit_identical(device):
    make_deterministic(device.type == "cuda")
    found = []
    for _ in range(2):
        module = pretraining(device)
        module.compile_mode = "default"
        steps(module, batches_of(device, 3), half=True)
        found.append(weights(module))
    assert torch.equal(*found)


def test_checkpoint_of_compiled_module_has_plain_names(device):
    module = pretraining(device)
    module.compile_mode = "default"
    steps(module, batches_of(device, 1))
    state = {name.removeprefix("model."): tensor.cpu() for name, tensor in module.state_dict().items()}
    other = MaskedImageModel(**module.model.config)
    load_exactly(other, state, "the compiled module")
    image = torch.rand(2, 3, 64, 64)
    assert error(module.model.encode(image.to(device)), other.encode(image)) < 1e-4


def test_activation_checkpointing_saves_memory(cuda):
    batch, peaks, found = moved(batch_of(64), cuda), [], []
    for checkpointing in (False, True):
        module = pretraining(cuda, depth=8)
        module.model.set_grad_checkpointing(checkpointing)
        torch.cuda.reset_peak_memory_stats()
        found.append(loss_and_gradients(module, batch)[1])
        peaks.append(torch.cuda.max_memory_allocated())
        del module
    assert peaks[1] < 0.7 * peaks[0]
    assert max(error(found[1][name], found[0][name]) for name in found[0]) < 1e-4
