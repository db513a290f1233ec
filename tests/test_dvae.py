"""The dVAE: temperature schedule, KL terms against torch.distributions, and overfitting a few images."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from beit_pretrain.engine.settings import OptimSettings
from beit_pretrain.errors import UserError
from beit_pretrain.tasks.tokenizer import GumbelConfig, TokenizerTraining, reconstruction_picture
from beit_pretrain.tokenizers.dvae import DiscreteVAE, DVAETokenizer

TINY = {"vocab_size": 16, "width": 8, "blocks": 1, "code_dim": 8}


def training(relaxation: GumbelConfig | None = None, **settings) -> TokenizerTraining:
    return TokenizerTraining(DiscreteVAE(**TINY | settings), OptimSettings(lr=1e-3), relaxation or GumbelConfig())


class TestTemperature:
    @pytest.mark.parametrize(
        ("progress", "expected"),
        [(0.0, 1.0), (0.175, 0.5), (0.35, 0.25), (0.525, 0.125), (0.7, 1 / 16), (0.8, 1 / 16), (1.0, 1 / 16)],
    )
    def test_halves_in_equal_times(self, progress, expected):
        assert GumbelConfig().temperature(progress) == pytest.approx(expected)

    def test_anneals_over_whole_run(self):
        relaxation = GumbelConfig(temperature_end=0.5, anneal=1.0)
        assert relaxation.temperature(0.5) == pytest.approx(math.sqrt(0.5))


class TestDivergences:
    def test_match_torch_distributions(self):
        torch.manual_seed(0)
        logits = torch.randn(3, 16, 2, 4) * 3
        kl, usage_kl = training().divergences(logits)
        q = Categorical(logits=logits.permute(0, 2, 3, 1))
        uniform = Categorical(probs=torch.full((16,), 1 / 16))
        assert kl.item() == pytest.approx(kl_divergence(q, uniform).mean().item(), abs=1e-5)
        mean = Categorical(probs=q.probs.mean((0, 1, 2)))
        assert usage_kl.item() == pytest.approx(kl_divergence(mean, uniform).item(), abs=1e-5)

    def test_uniform_and_collapsed_codes(self):
        undecided = torch.zeros(2, 16, 4, 4)
        assert [value.item() for value in training().divergences(undecided)] == pytest.approx([0, 0], abs=1e-5)
        collapsed = undecided.clone()
        collapsed[:, 3] = 100
        assert [v.item() for v in training().divergences(collapsed)] == pytest.approx([math.log(16)] * 2, abs=1e-5)
        decided_but_even = 100 * torch.eye(16).view(1, 16, 4, 4)  # every patch another token
        kl, usage_kl = training().divergences(decided_but_even)
        assert kl.item() == pytest.approx(math.log(16), abs=1e-5)
        assert usage_kl.item() == pytest.approx(0, abs=1e-5)


class TestNetwork:
    def test_shapes(self):
        model = DiscreteVAE(**TINY)
        logits = model.logits(torch.rand(2, 3, 32, 48))
        assert logits.shape == (2, 16, 4, 6)
        assert model.reconstruct(logits.softmax(1)).shape == (2, 3, 32, 48)
        assert model.decode(logits.argmax(1)).shape == (2, 3, 32, 48)
        assert DiscreteVAE(**TINY, in_chans=1).decode(torch.zeros(1, 2, 2, dtype=torch.long)).shape == (1, 1, 16, 16)

    def test_decode_is_reconstruction_from_one_hot_codes(self):
        model = DiscreteVAE(**TINY)
        ids = torch.randint(16, (2, 4, 4))
        one_hot = torch.nn.functional.one_hot(ids, 16).permute(0, 3, 1, 2).float()
        assert torch.allclose(model.decode(ids), model.reconstruct(one_hot), atol=1e-5)

    def test_config_rebuilds_network(self):
        model = DiscreteVAE(**TINY)
        DiscreteVAE(**model.config).load_state_dict(model.state_dict())

    def test_reconstruction_picture(self):
        picture = reconstruction_picture(DiscreteVAE(**TINY), torch.rand(2, 3, 16, 16))
        assert picture.width > 32
        assert picture.height > 32


def test_overfits_a_few_colours():
    """Four images of one colour each: the reconstruction error falls, and more than one token is used."""
    torch.manual_seed(0)
    colours = torch.tensor([[230, 20, 20], [20, 230, 20], [20, 20, 230], [230, 230, 20]], dtype=torch.uint8)
    batch = {"image": colours.view(4, 3, 1, 1).expand(-1, -1, 16, 16), "position": torch.zeros(4, dtype=torch.long)}
    module = training(GumbelConfig(usage_weight=0.01), width=16)
    # training_step asks the trainer for nothing but the progress of the run.
    module.trainer = run = SimpleNamespace(global_step=0, max_steps=400)
    optimizer = torch.optim.Adam(module.model.parameters(), lr=2e-3)

    @torch.no_grad()
    def error() -> tuple[float, torch.Tensor]:
        image = batch["image"].float() / 255
        ids = module.model.logits(image).argmax(1)
        return (module.model.decode(ids).clamp(0, 1) - image).square().mean().item(), ids

    before, _ = error()
    for run.global_step in range(400):
        optimizer.zero_grad()
        module.training_step(batch, run.global_step).backward()
        optimizer.step()
    after, ids = error()
    assert after < before / 5
    assert len(ids.unique()) > 1


@pytest.mark.parametrize("bad", [{"anneal": 0}, {"temperature_end": 0}, {"temperature_end": 2}])
def test_invalid_relaxation_settings(bad):
    with pytest.raises(ValueError, match="GumbelConfig"):
        GumbelConfig(**bad)


def test_checkpoint_with_unknown_arguments_is_refused(tmp_path):
    content = {"beit_pretrain": {"kind": "tokenizer", "model": {"colour": 3}}, "state_dict": {}}
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="cannot build"):
        DVAETokenizer(tmp_path / "other.ckpt")
