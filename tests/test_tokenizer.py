"""Tokenizers: OpenAI's files are checked and never executed; a self-trained dVAE has the same interface."""

import os
import pickle
from types import SimpleNamespace

import pytest
import tiny
import torch
from dall_e import map_pixels, unmap_pixels
from dall_e.encoder import Encoder
from tiny import DVAE, write_checkpoint

from beit_pretrain.errors import UserError
from beit_pretrain.models.backbone import Classifier
from beit_pretrain.tokenizers import dalle_encoder as encoder_module
from beit_pretrain.tokenizers.dalle_encoder import FusedEncoder, SplitProduct, conv_relu, in_two_kernels
from beit_pretrain.tokenizers.dvae import DiscreteVAE, DVAETokenizer
from beit_pretrain.tokenizers.tokenizer import (
    OpenAITokenizer,
    check_channels,
    codebook_use,
    square_grid,
    view_size,
)


def images(side: int = 32, batch: int = 2) -> torch.Tensor:
    torch.manual_seed(0)
    coarse = torch.rand(batch, 3, 8, 8)
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")


def refusal(folder) -> str:
    return tiny.refusal(OpenAITokenizer, folder)


class TestOpenAI:
    def test_encode_equals_argmax_of_dall_e(self, openai_files):
        tokenizer = OpenAITokenizer(openai_files)
        encoder = torch.load(openai_files / "encoder.pkl", weights_only=False)
        with torch.no_grad():
            expected = encoder(map_pixels(images())).argmax(1)
        ids = tokenizer.encode(images())
        assert torch.equal(ids, expected.flatten(1))
        assert (ids.shape, ids.dtype) == ((2, 16), torch.int64)
        assert len(ids.unique()) > 1
        assert (tokenizer.vocab_size, tokenizer.downsample) == (512, 8)

    def test_ids_are_row_major(self, openai_files):
        """A change at the bottom of the image changes the last ids."""
        tokenizer = OpenAITokenizer(openai_files)
        image, other = images(64), images(64)
        other[:, :, 56:] = 1 - other[:, :, 56:]
        changed = (tokenizer.encode(image) != tokenizer.encode(other)).any(0).view(8, 8)
        assert changed[-1].any()
        assert not changed[:4].any()

    def test_decode_equals_dall_e(self, openai_files):
        tokenizer = OpenAITokenizer(openai_files)
        ids = tokenizer.encode(images())
        decoder = torch.load(openai_files / "decoder.pkl", weights_only=False)
        one_hot = torch.nn.functional.one_hot(ids.view(2, 4, 4), 512).permute(0, 3, 1, 2).float()
        with torch.no_grad():
            expected = unmap_pixels(torch.sigmoid(decoder(one_hot)[:, :3]))
        decoded = tokenizer.decode(ids)
        assert torch.allclose(decoded, expected, atol=1e-6)
        assert decoded.shape == (2, 3, 32, 32)
        assert decoded.min() >= 0
        assert decoded.max() <= 1

    def test_is_frozen_and_in_eval_mode(self, openai_files):
        tokenizer = OpenAITokenizer(openai_files)
        for module in (tokenizer.encoder, tokenizer.decoder):
            assert not module.training
            assert not any(p.requires_grad for p in module.parameters())
        assert not isinstance(tokenizer, torch.nn.Module)
        assert tokenizer.to(torch.device("cpu")) is tokenizer
        assert not tokenizer.encode(images().requires_grad_()).requires_grad

    def test_ignores_autocast(self, openai_files):
        tokenizer = OpenAITokenizer(openai_files)
        with torch.autocast("cpu", torch.bfloat16):
            under = tokenizer.encode(images())
        assert torch.equal(under, tokenizer.encode(images()))

    def test_decoder_is_optional(self, openai_files, tmp_path):
        (tmp_path / "encoder.pkl").write_bytes((openai_files / "encoder.pkl").read_bytes())
        tokenizer = OpenAITokenizer(tmp_path)
        ids = tokenizer.encode(images())
        with pytest.raises(UserError, match=r"decoder\.pkl does not exist"):
            tokenizer.decode(ids)

    def test_missing_file(self, tmp_path):
        said = refusal(tmp_path)
        assert "encoder.pkl does not exist" in said
        assert "data/README.md" in said
        assert "fit +experiment=tokenizer" in said
        assert "does not exist" in refusal(tmp_path / "nowhere")

    def test_decoder_in_place_of_encoder(self, openai_files, tmp_path):
        (tmp_path / "encoder.pkl").write_bytes((openai_files / "decoder.pkl").read_bytes())
        assert "holds a Decoder, not the Encoder of the dall_e package" in refusal(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"no pickle, but a text\n", b"\x80\x02"])
    def test_not_a_pickle(self, content, tmp_path):
        (tmp_path / "encoder.pkl").write_bytes(content)
        assert "is not OpenAI's encoder.pkl" in refusal(tmp_path)

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
    def test_truncated_file(self, share, openai_files, tmp_path):
        whole = (openai_files / "encoder.pkl").read_bytes()
        (tmp_path / "encoder.pkl").write_bytes(whole[: int(share * len(whole))])
        assert "is not OpenAI's encoder.pkl" in refusal(tmp_path)

    @pytest.mark.parametrize(
        "content", [{"weight": torch.zeros(3)}, torch.zeros(3), torch.nn.Sequential(torch.nn.ReLU())]
    )
    def test_pickle_of_other_object(self, content, tmp_path):
        torch.save(content, tmp_path / "encoder.pkl")
        assert "not the Encoder of the dall_e package" in refusal(tmp_path)

    def test_encoder_with_other_tensors(self, openai_files, tmp_path):
        encoder = torch.load(openai_files / "encoder.pkl", weights_only=False)
        del encoder.blocks.group_3
        torch.save(encoder, tmp_path / "encoder.pkl")
        assert "does not have the tensors of OpenAI's encoder" in refusal(tmp_path)

    @pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))])
    def test_hostile_pickle_is_not_executed(self, save, tmp_path):
        save(Hostile(tmp_path / "executed"), tmp_path / "encoder.pkl")
        assert "is not OpenAI's encoder.pkl" in refusal(tmp_path)
        assert not (tmp_path / "executed").exists()

    def test_hostile_pickle_runs_if_unpickled(self, tmp_path):
        """Shows that the test above is meaningful."""
        pickle.loads(pickle.dumps(Hostile(tmp_path / "executed")))
        assert (tmp_path / "executed").exists()


class Hostile:
    """Runs a shell command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


class TestDVAE:
    def test_round_trip(self, dvae_checkpoint):
        tokenizer = DVAETokenizer(dvae_checkpoint)
        content = torch.load(dvae_checkpoint, weights_only=True)
        model = DiscreteVAE(**content["beit_pretrain"]["model"])
        model.load_state_dict({name.removeprefix("model."): t for name, t in content["state_dict"].items()})
        with torch.no_grad():
            expected = model.logits(images()).argmax(1)
            decoded = model.decode(expected).clamp(0, 1)
        ids = tokenizer.encode(images())
        assert torch.equal(ids, expected.flatten(1))
        assert torch.equal(tokenizer.decode(ids), decoded)
        assert decoded.shape == (2, 3, 32, 32)
        assert (tokenizer.vocab_size, tokenizer.downsample) == (32, 8)

    def test_is_frozen_and_in_eval_mode(self, dvae_checkpoint):
        tokenizer = DVAETokenizer(dvae_checkpoint)
        assert not tokenizer.model.training
        assert not any(p.requires_grad for p in tokenizer.model.parameters())
        assert not isinstance(tokenizer, torch.nn.Module)
        assert tokenizer.to(torch.device("cpu")) is tokenizer

    def test_classifier_is_refused(self, tmp_path):
        model = Classifier(2, image_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2)
        path = write_checkpoint(tmp_path / "last.ckpt", "classifier", model, classes=["cat", "dog"])
        with pytest.raises(UserError, match=r"holds a fine-tuned classifier; a tokenizer \(dVAE\) is needed here"):
            DVAETokenizer(path)

    def test_openai_file_is_refused(self, openai_files):
        with pytest.raises(UserError, match=r"encoder\.pkl cannot be read as a checkpoint"):
            DVAETokenizer(openai_files / "encoder.pkl")


class Eight:
    """The attributes of a tokenizer that `view_size` needs."""

    downsample = 8


class TestViewSize:
    @pytest.mark.parametrize(("grid", "size"), [((14, 14), 112), ((16, 16), 128), ((8, 8), 64)])
    def test_one_token_per_patch(self, grid, size):
        assert view_size(grid, Eight()) == view_size(grid, Eight(), size) == size

    def test_wrong_token_image_size_is_explained(self):
        """The encoder fed 224 x 224 would give 28 x 28 tokens."""
        with pytest.raises(UserError) as caught:
            view_size((14, 14), Eight(), 224)
        assert str(caught.value) == (
            "data.token_image_size=224 gives 28 x 28 tokens for 14 x 14 patches; "
            "one token per patch needs data.token_image_size=112"
        )
        with pytest.raises(UserError, match=r"gives 12\.5 x 12\.5 tokens"):
            view_size((14, 14), Eight(), 100)


class TestChannels:
    def test_grey_is_repeated_and_more_are_cut(self, openai_files):
        tokenizer, grey = OpenAITokenizer(openai_files), torch.rand(1, 1, 16, 16)
        assert tokenizer.in_chans == 3
        expected = tokenizer.encode(grey.expand(-1, 3, -1, -1))
        assert torch.equal(tokenizer.encode(grey), expected)
        assert torch.equal(
            tokenizer.encode(torch.cat([grey.expand(-1, 3, -1, -1), torch.rand(1, 1, 16, 16)], 1)), expected
        )

    @pytest.mark.parametrize(("takes", "channels", "fits"), [(3, 1, True), (3, 4, True), (1, 1, True), (1, 3, False)])
    def test_check_channels(self, takes, channels, fits):
        tokenizer = SimpleNamespace(in_chans=takes)
        if fits:
            check_channels(tokenizer, channels)
        else:
            with pytest.raises(UserError, match=f"takes images of {takes} channels, but data.channels={channels}"):
                check_channels(tokenizer, channels)


class TestCodebookUse:
    def test_even_use(self):
        assert codebook_use(torch.full((64,), 3.0)) == {
            "codebook_perplexity": pytest.approx(64),
            "codebook_distinct": 64,
        }

    def test_single_token(self):
        counts = torch.zeros(64)
        counts[5] = 1e6
        assert codebook_use(counts) == {"codebook_perplexity": pytest.approx(1), "codebook_distinct": 1}

    def test_example(self):
        use = codebook_use(torch.tensor([2, 1, 1, 0]))
        assert use == {"codebook_perplexity": pytest.approx(2**1.5), "codebook_distinct": 3}  # 1.5 bits

    def test_empty_counts(self):
        assert codebook_use(torch.zeros(8)) == {"codebook_perplexity": 1, "codebook_distinct": 0}


def test_square_grid():
    ids = torch.arange(18).view(2, 9)
    assert square_grid(ids).tolist() == [[[0, 1, 2], [3, 4, 5], [6, 7, 8]], [[9, 10, 11], [12, 13, 14], [15, 16, 17]]]
    with pytest.raises(ValueError, match="8 tokens are no square grid"):
        square_grid(ids[:, :8])


def test_fixture_is_small(dvae_checkpoint):
    assert DVAETokenizer(dvae_checkpoint).model.config == DVAE


class TestFusedEncoder:
    """Against the module of dall_e; in half precision against its forward pass written out, since it needs CUDA."""

    @pytest.fixture(scope="class")
    def encoder(self):
        torch.manual_seed(0)
        return Encoder(n_hid=64, n_blk_per_group=2, vocab_size=512).eval().requires_grad_(False)

    @pytest.mark.parametrize("blocked", [True, False])
    @pytest.mark.parametrize("side", [32, 56])
    def test_logits_equal_dall_e(self, encoder, blocked, side, monkeypatch):
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: blocked)
        fused = FusedEncoder(encoder, torch.device("cpu"))
        assert fused.blocked == blocked
        image = map_pixels(images(side, 3))
        with torch.no_grad():
            torch.testing.assert_close(fused(image), encoder(image), atol=1e-5, rtol=1e-5)
            assert torch.equal(fused(image).argmax(1), encoder(image).argmax(1))

    @pytest.mark.long
    @pytest.mark.parametrize("blocked", [True, False])
    def test_compiled_logits_are_equal(self, encoder, blocked, monkeypatch):
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: blocked)
        tokenizer = OpenAITokenizer.of(encoder)
        assert torch.equal(torch.compile(tokenizer.encode, dynamic=False)(images()), tokenizer.encode(images()))

    def test_half_precision_is_as_accurate_as_release(self, encoder):
        """It changes no more tokens from single precision than the release does, within statistical error."""

        def release(x: torch.Tensor) -> torch.Tensor:
            def conv(x, c, half=True):
                w, b = (c.w.half(), c.b.half()) if half else (c.w, c.b)
                return torch.nn.functional.conv2d(x.half() if half else x.float(), w, b, padding=(c.kw - 1) // 2)

            x = conv(x, encoder.blocks.input)
            for number in range(1, 5):
                for name, block in getattr(encoder.blocks, f"group_{number}").named_children():
                    if name == "pool":
                        x = torch.nn.functional.max_pool2d(x, 2)
                        continue
                    out = x
                    for step in range(1, 5):
                        out = conv(out.relu(), getattr(block.res_path, f"conv_{step}"))
                    identity = x if isinstance(block.id_path, torch.nn.Identity) else conv(x, block.id_path)
                    x = identity + block.post_gain * out
            return conv(x.relu(), encoder.blocks.output.conv, half=False)

        # Channels innermost: a CPU's fp16 convolutions take 20 times as long otherwise.
        image = map_pixels(images(64, 24)).contiguous(memory_format=torch.channels_last)
        fused = FusedEncoder(encoder, torch.device("cpu"), half=True)
        with torch.no_grad():
            exact = encoder(image).argmax(1)
            logits = fused(image), release(image)
        ours, theirs = ((found.argmax(1) != exact).float().mean() for found in logits)
        assert logits[0].dtype == torch.float32
        assert exact.unique().numel() > 10, (ours, theirs)
        assert ours <= theirs + 0.01
        assert ours < 0.02, (ours, theirs)

    def test_is_prepared_by_to_device(self, encoder, monkeypatch):
        tokenizer = OpenAITokenizer.of(encoder)
        tokenizer.to(torch.device("cpu"))
        monkeypatch.setattr(FusedEncoder, "__init__", lambda *given: pytest.fail("prepared in a step"))
        tokenizer.encode(images())
        tokenizer.to(torch.device("cpu"))  # it is there already

    def test_fused_op_passes_opcheck(self):
        torch.manual_seed(0)
        x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(16, 8, 3, 3).contiguous(memory_format=torch.channels_last)
        torch.library.opcheck(conv_relu, (x, weight, torch.randn(16), 1))

    @pytest.mark.parametrize("wrong", ["no such kernel", "not-a-number", "other numbers", ""])
    def test_fused_kernel_is_verified_before_use(self, wrong, monkeypatch, capsys):
        """For every shape; here another op takes its place, since a CPU has none."""

        def kernel(*given):
            if wrong == "no such kernel":
                raise RuntimeError("cuDNN has no such kernel")
            return in_two_kernels(*given) * {"not-a-number": torch.nan, "other numbers": 1.1, "": 1.001}[wrong]

        monkeypatch.setattr(encoder_module, "in_one_kernel", kernel)
        works = encoder_module.one_kernel_works(torch.randn(2, 8, 6, 6), torch.randn(16, 8, 3, 3), torch.randn(16), 1)
        assert works == (wrong == "")
        said = capsys.readouterr().err
        assert ("16x8x3x3 convolutions are not fused" in said) == (wrong != "")

    def test_deterministic_mode_disables_fused_kernel(self, encoder):
        """cuDNN's fused kernel may take any algorithm."""
        assert FusedEncoder(encoder, torch.device("cpu"), half=True).fused
        torch.use_deterministic_algorithms(True)
        try:
            plain = FusedEncoder(encoder, torch.device("cpu"), half=True)
        finally:
            torch.use_deterministic_algorithms(False)
        assert not plain.fused
        fused = FusedEncoder(encoder, torch.device("cpu"), half=True)
        assert torch.equal(plain(map_pixels(images())), fused(map_pixels(images())))


def without_last_bits(x: torch.Tensor, bits: int = 13) -> torch.Tensor:
    """float32 rounded to 23 - bits bits of mantissa; bits=13 gives TF32."""
    return ((x.view(torch.int32) + (1 << (bits - 1))) & -(1 << bits)).view(torch.float32)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_split_product_is_as_accurate_as_float32(scale):
    """Its error against float64 is hundreds of times smaller than TF32's and near that of float32."""
    torch.manual_seed(0)
    weight, bias = scale * 0.05 * torch.randn(512, 1024, 1, 1), scale * torch.randn(512)
    x = torch.randn(2, 1024, 3, 3).relu().half().contiguous(memory_format=torch.channels_last)
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), bias.double())
    single = torch.nn.functional.conv2d(x.float(), weight, bias)
    tf32 = torch.nn.functional.conv2d(x.float(), without_last_bits(weight), bias)
    errors = [float((y - exact).norm() / exact.norm()) for y in (SplitProduct(weight, bias)(x), single, tf32)]
    assert errors[0] < 5e-7, errors
    assert errors[0] < errors[2] / 200, errors
    assert errors[0] < 3 * errors[1], errors
