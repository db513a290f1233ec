"""Several processes: invalid device counts, ranks that disagree, DDP. Tests that start processes are in soak/."""

from __future__ import annotations

import pytest
import torch
from lightning import LightningModule
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from test_dist_env import SRUN, TORCHRUN, variables  # noqa: F401 (a fixture)
from tiny import SIZE, tiny_words
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from beit_pretrain.engine.distributed import disagreement, flat, lost_connection, resolve_trainer_args
from beit_pretrain.engine.optim import clip_gradients
from beit_pretrain.engine.subprocess_launcher import DDP, has_local_statistics
from beit_pretrain.errors import UserError
from beit_pretrain.models.backbone import MaskedImageModel
from beit_pretrain.models.upernet import Segmenter
from beit_pretrain.tokenizers.dvae import DiscreteVAE

TRAINER = {"accelerator": "cpu", "devices": "auto", "num_nodes": "auto", "strategy": "auto", "precision": "32-true"}


@pytest.fixture
def words(shards, dvae_checkpoint):
    return ["fit", *tiny_words(shards, dvae_checkpoint)]


@pytest.mark.parametrize(
    ("given", "kind", "devices", "nodes"),
    [
        ({}, LightningEnvironment, "auto", 1),
        (SRUN, SLURMEnvironment, 4, 2),
        (TORCHRUN, TorchElasticEnvironment, 2, 2),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, LightningEnvironment, "auto", 1),
    ],
)
def test_device_counts_come_from_launcher(given, kind, devices, nodes, variables):  # noqa: F811
    variables(given)
    settings = resolve_trainer_args(TRAINER, 3)
    assert (settings["devices"], settings["num_nodes"]) == (devices, nodes)
    (environment,) = settings["plugins"]
    assert type(environment) is kind
    assert getattr(environment, "auto_requeue", False) is False
    if given and nodes > 1:
        assert isinstance(settings["strategy"], DDPStrategy)
        assert settings["strategy"]._timeout.total_seconds() == 180


@pytest.mark.parametrize(
    ("given", "asked", "gpus", "said"),
    [
        (
            SRUN,
            {"devices": 2},
            0,
            "trainer.devices=2 x trainer.num_nodes=2 = 4 processes, but srun started 8: 4 on each",
        ),
        (SRUN, {"num_nodes": 1}, 0, "= 4 processes, but srun started 8"),
        (TORCHRUN, {"devices": 4, "num_nodes": 1}, 0, "but torchrun started 4: 2 on each of 2 nodes"),
        ({}, {"accelerator": "auto", "devices": 8}, 2, "has 2 GPUs"),
        (TORCHRUN, {"accelerator": "gpu"}, 1, "trainer.devices=2, but .* has 1 GPU$"),
        ({}, {"accelerator": "gpu"}, 0, "torch finds no GPU"),
        ({}, {"num_nodes": 2}, 0, "needs a launcher on every node"),
        ({}, {"strategy": "fsdp"}, 0, "more than one"),
    ],
)
def test_wrong_device_counts(given, asked, gpus, said, variables, monkeypatch):  # noqa: F811
    variables(given)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UserError, match=said):
        resolve_trainer_args({**TRAINER, **asked}, 3)


@pytest.mark.parametrize("wrong", ["trainer.devices=3", "global_batch_size=7", "optim.lr=-1", "epochs=2"])
def test_only_rank_0_prints_shared_errors(wrong, words, run_cli, variables):  # noqa: F811
    for rank, lines in (("0", 1), ("5", 0)):
        variables({**SRUN, "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": "0"})
        code, _, stderr = run_cli(*words, "steps=1", wrong)
        assert code == 2
        assert len([line for line in stderr.splitlines() if line.startswith("error:")]) == lines, stderr


def test_fsdp_strategy(variables):  # noqa: F811
    variables({})
    assert isinstance(
        resolve_trainer_args({**TRAINER, "strategy": "fsdp", "devices": 2}, 3)["strategy"], ModelParallelStrategy
    )


class Wraps(LightningModule):
    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args):
        return self.model(*args)


class TestDDP:
    @pytest.fixture
    def group(self, tmp_path):
        """A process group of one process."""
        distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
        yield
        distributed.destroy_process_group()

    def wrapped(self, model: torch.nn.Module, compression: str | None = None) -> DistributedDataParallel:
        strategy = DDP(compression, parallel_devices=[torch.device("cpu")], cluster_environment=LightningEnvironment())
        strategy.model = Wraps(model)
        strategy.configure_ddp()
        return strategy.model

    def test_gradients_are_views_of_buckets(self, group):
        ddp = self.wrapped(torch.nn.Linear(3, 2))
        assert ddp.gradient_as_bucket_view
        ddp(torch.ones(1, 3)).sum().backward()
        weight, bias = (parameter.grad for parameter in ddp.module.model.parameters())
        assert weight.untyped_storage().data_ptr() == bias.untyped_storage().data_ptr()
        assert clip_gradients(ddp.module.model.parameters(), 0.5, 2.0) > 0.5  # in place, which keeps them views
        assert weight.untyped_storage().data_ptr() == bias.untyped_storage().data_ptr()
        assert torch.cat([weight.flatten(), bias]).norm().item() == pytest.approx(0.5, rel=1e-4)

    def test_buffers_are_broadcast_only_with_batch_norm(self, group):
        """Local batch norm statistics are broadcast, position index tables are not."""
        segmenter = Segmenter(3, {"channels": 16, "aux_channels": 8}, **SIZE)
        assert self.wrapped(segmenter).broadcast_buffers
        assert not has_local_statistics(torch.nn.SyncBatchNorm.convert_sync_batchnorm(segmenter))
        assert not self.wrapped(MaskedImageModel(32, **SIZE)).broadcast_buffers

    def test_buffers_that_are_not_broadcast_are_constant(self):
        """They depend neither on the weights nor on what was computed."""
        masked, image = torch.ones(2, 16).bool(), torch.rand(2, 3, 32, 32)
        one, other = (MaskedImageModel(32, **SIZE) for _ in range(2))
        other.train()(image, masked).sum().backward()
        buffers = dict(one.named_buffers())
        assert buffers
        for name, buffer in other.named_buffers():
            assert torch.equal(buffer, buffers.pop(name)), name
        assert not buffers
        assert not list(DiscreteVAE(32, 8, 1, 8).buffers())

    def test_bf16_gradient_compression(self, group):
        ddp = self.wrapped(torch.nn.Linear(3, 1), "bf16")
        ddp(torch.full((1, 3), 1 + 2**-10)).sum().backward()
        assert ddp.module.model.weight.grad.tolist() == [[1, 1, 1]]  # bf16 has 8 bits

    @pytest.mark.parametrize(
        ("asked", "said"), [({"devices": 1}, "one process"), ({"devices": 2, "strategy": "fsdp"}, "strategy=fsdp")]
    )
    def test_gradient_compression_needs_ddp(self, asked, said, variables):  # noqa: F811
        variables({})
        with pytest.raises(UserError, match=f"gradient_compression=bf16 is for DDP .* not for .*{said}"):
            resolve_trainer_args({**TRAINER, **asked}, 3, "bf16")
        assert isinstance(resolve_trainer_args({**TRAINER, "devices": 2}, 3, "bf16")["strategy"], DDP)

    def test_gradient_compression_needs_several_processes(self, words, refused):
        assert "not for one process" in refused(*words, "steps=1", "gradient_compression=bf16")


@pytest.mark.parametrize("value", ["0", "two", "[]", "true", "-2"])
def test_invalid_devices(value, words, refused):
    assert "trainer.devices must be auto" in refused(*words, "steps=1", f"trainer.devices={value}")


def test_first_differing_rank_is_named():
    same = {"optim.lr": "0.1", "images of data.train": "abc"}
    assert disagreement([("a", same), ("b", dict(same))]) is None
    said = disagreement([("a", same), ("b", same), ("c", {**same, "images of data.train": "abd"})])
    assert said is not None
    assert "rank 2 on c" in said
    assert "images of data.train=abd (rank 0: abc)" in said
    assert disagreement([("a", same), ("b", {**same, "more": "1"})]) is not None


def test_paths_may_differ_between_ranks():
    assert flat({"data": {"train": "/here", "cache_dir": "/there", "scale": [1, 2]}, "seed": 0}) == {
        "data.scale": "[1, 2]",
        "seed": "0",
    }


def test_lost_connection_is_found_in_exception_chain():
    def fail():
        try:
            raise RuntimeError("[/x/pair.cc:538] Read error [127.0.0.1]:1: Connection reset by peer")
        except RuntimeError as error:
            raise RuntimeError("DataLoader worker is killed") from error

    with pytest.raises(RuntimeError) as caught:
        fail()
    assert "reset by peer" in str(lost_connection(caught.value))
    assert lost_connection(RuntimeError("shapes differ")) is None


@pytest.mark.parametrize(
    "said",
    [
        "Application timeout caused pair closure",  # gloo, when a process hangs in an exchange
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:24421",
        "Timed out after 46 seconds waiting for clients. 1/2 clients joined.",
    ],
)
def test_lost_connection_messages_of_torch(said):
    assert str(lost_connection(RuntimeError(said))) == said
