"""How new weights are drawn: the formulas of --init, against torch's own, and the first of them bit for bit."""

import hashlib
import math

import pytest
import torch
from torch import nn

from model.build import ModelRequest, choose_model, fill_model
from model.decoder import Decoder, DecoderConfig
from model.export import export_model
from model.loading import build_model
from tests.tiny_model import SHAPE

INITS = ("fan_in", "normal", "kaiming", "xavier")
WIDE = DecoderConfig(
    vocab_size=500, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False, initializer_range=0.05,
)  # fmt: skip


def digest_of(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode() + parameter.detach().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("tied", [True, False])
def test_fan_in_draws_the_numbers_that_were_drawn_before_there_was_a_choice(tied):
    config = DecoderConfig(**SHAPE, tie_word_embeddings=tied)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in build_model(config, 7).named_parameters():
        if parameter.dim() == 1:
            continue
        draw = torch.empty(parameter.shape).normal_(0.0, 1.0, generator=generator)
        depth = 2 * config.num_hidden_layers if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
        is_embedding = name == "model.embed_tokens.weight"
        expected = draw * config.initializer_range if is_embedding else draw / math.sqrt(parameter.shape[1] * depth)
        assert torch.equal(parameter, expected), name


@pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="torch draws other last bits without AVX"
)
@pytest.mark.parametrize(
    ("tied", "digest"),
    [
        (True, "8e88f059575e2c49493ec1880c058150eaff3a0e6dae976061c0a46132f0302a"),
        (False, "b6bd68a68ced945d2a24eec7ad99de4a97637b7b3aeb1f1351a31968139beabc"),
    ],
)
def test_fan_in_draws_the_bits_that_it_always_drew(tied, digest):
    config = DecoderConfig(**SHAPE, tie_word_embeddings=tied)
    assert digest_of(build_model(config, 0)) == digest
    assert digest_of(build_model(config, 0, "fan_in")) == digest
    assert len({digest_of(build_model(config, 0, init)) for init in INITS}) == 4


# The last number of a row is that of what writes into the residual stream: 1 / sqrt(2 x 3 layers) of it.
STANDARD_DEVIATIONS = {
    "fan_in": {"up_proj": 1 / 8, "k_proj": 1 / 8, "lm_head": 1 / 8, "down_proj": math.sqrt(1 / 160 / 6)},
    "normal": {"up_proj": 0.05, "k_proj": 0.05, "lm_head": 0.05, "down_proj": 0.05 / math.sqrt(6)},
    "kaiming": {
        "up_proj": math.sqrt(2 / 64), "k_proj": math.sqrt(2 / 64), "lm_head": math.sqrt(2 / 64),
        "down_proj": math.sqrt(2 / 160 / 6),
    },
    "xavier": {
        "up_proj": math.sqrt(2 / 224), "k_proj": math.sqrt(2 / 96), "lm_head": math.sqrt(2 / 564),
        "down_proj": math.sqrt(2 / 224 / 6),
    },
}  # fmt: skip


@pytest.mark.parametrize("init", INITS)
def test_standard_deviations(init):
    weights = dict(build_model(WIDE, 0, init).named_parameters())
    for kind, expected in STANDARD_DEVIATIONS[init].items():
        drawn = torch.cat([tensor.flatten() for name, tensor in weights.items() if kind in name])
        assert drawn.std().item() == pytest.approx(expected, rel=0.03), kind
        assert abs(drawn.mean().item()) < 5 * expected / math.sqrt(len(drawn)), kind
    assert weights["model.embed_tokens.weight"].std().item() == pytest.approx(0.05, rel=0.03)
    assert all(torch.equal(t, torch.ones_like(t)) for name, t in weights.items() if "norm" in name)


@pytest.mark.parametrize(
    ("init", "oracle"),
    [
        ("fan_in", lambda w, g: nn.init.kaiming_normal_(w, nonlinearity="linear", generator=g)),
        ("normal", lambda w, g: nn.init.normal_(w, 0.0, 0.05, generator=g)),
        ("kaiming", lambda w, g: nn.init.kaiming_normal_(w, nonlinearity="relu", generator=g)),
        ("xavier", lambda w, g: nn.init.xavier_normal_(w, generator=g)),
    ],
)
def test_the_numbers_are_those_of_torch(init, oracle):
    generator = torch.Generator().manual_seed(3)
    for name, parameter in build_model(WIDE, 3, init).named_parameters():
        if parameter.dim() == 1:
            continue
        expected = torch.empty(parameter.shape)
        if name == "model.embed_tokens.weight":
            nn.init.normal_(expected, 0.0, 0.05, generator=generator)
        else:
            oracle(expected, generator)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            expected /= math.sqrt(6)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("init", INITS)
def test_a_part_of_a_tensor_is_filled_with_that_part_of_the_whole(init):
    wanted = ModelRequest(shape={"hidden_size": 32, "num_hidden_layers": 2}, seed=5, init=init)
    whole = choose_model(wanted, 97)
    for rank in range(2):
        model, parts = Decoder(whole.config), {}

        def part_of(parameter, rank=rank, parts=parts):
            """The upper or the lower half of the rows, as a process of two would hold it."""
            rows = -(-len(parameter) // 2)
            parts[parameter] = parameter.data[rows * rank : rows * (rank + 1)].zero_()
            return parts[parameter], (rows * rank, *(0,) * (parameter.dim() - 1))

        fill_model(model, wanted, part_of, torch.float32)
        assert len(parts) == len(dict(model.named_parameters()))
        for own, other in zip(model.parameters(), whole.parameters(), strict=True):
            rows = -(-len(other) // 2)
            assert torch.equal(parts[own], other[rows * rank : rows * (rank + 1)])


def test_how_the_weights_were_drawn_is_no_part_of_the_exported_model(tmp_path):
    from model.build import OWN_TOKENIZER, load_tokenizer

    tokenizer = load_tokenizer(str(OWN_TOKENIZER))
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for init in ("fan_in", "xavier"):
        export_model(tmp_path / init, choose_model(ModelRequest(shape=shape, init=init), len(tokenizer)), tokenizer)
    configs = [(tmp_path / init / "config.json").read_text() for init in ("fan_in", "xavier")]
    assert configs[0] == configs[1] and "xavier" not in configs[1]
