"""Packed documents do not see each other, and inside a document attention is the textbook formula."""

import pytest
import torch

from model.attention import document_attention
from model.rope import rotary_angles, rotate

LENGTHS = [5, 1, 9, 2]
BOUNDARIES = torch.tensor([0, 5, 6, 15, 17], dtype=torch.int32)


def random_qkv(kv_heads=2, dtype=torch.float64):
    numbers = torch.Generator().manual_seed(0)
    shapes = [(sum(LENGTHS), heads, 8) for heads in (4, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=numbers, dtype=torch.float64).to(dtype) for shape in shapes]


def textbook(q, k, v, lengths=LENGTHS, scale=8**-0.5, window=None, softcap=None, sinks=None):
    """One query at a time, one head at a time, as the formula reads."""
    output = torch.zeros_like(q)
    for end, length in zip(torch.tensor(lengths).cumsum(0).tolist(), lengths, strict=True):
        for t in range(end - length, end):
            first = end - length if window is None else max(end - length, t + 1 - window)
            for head in range(q.shape[1]):
                shared = head * k.shape[1] // q.shape[1]
                scores = k[first : t + 1, shared] @ q[t, head] * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                extra = scores[:0] if sinks is None else sinks[head : head + 1]
                weights = torch.cat([scores, extra]).softmax(0)[: len(scores)]
                output[t, head] = weights @ v[first : t + 1, shared]
    return output


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    "options",
    [{}, {"scale": 0.5}, {"window": 3}, {"softcap": 2.0}, {"sinks": torch.arange(4.0)}, {"window": 2, "softcap": 1.0}],
)
def test_every_option_is_the_textbook_formula(kv_heads, options):
    q, k, v = random_qkv(kv_heads)
    options = {name: o.double() if isinstance(o, torch.Tensor) else o for name, o in options.items()}
    output = document_attention(q, k, v, BOUNDARIES, LENGTHS, **options)
    torch.testing.assert_close(output, textbook(q, k, v, **options), rtol=0, atol=1e-12)
    if options:
        assert (output - textbook(q, k, v)).abs().max() > 1e-3


def test_a_window_that_covers_every_document_changes_nothing():
    q, k, v = random_qkv()
    assert torch.equal(
        document_attention(q, k, v, BOUNDARIES, LENGTHS, window=9), document_attention(q, k, v, BOUNDARIES, LENGTHS)
    )


def test_grouped_heads_equal_repeated_ones():
    q, k, v = random_qkv()
    repeated = [x.repeat_interleave(2, dim=1) for x in (k, v)]
    torch.testing.assert_close(
        document_attention(q, k, v, BOUNDARIES, LENGTHS),
        document_attention(q, *repeated, BOUNDARIES, LENGTHS),
        rtol=0,
        atol=1e-12,
    )


def test_one_document_has_no_influence_on_another():
    q, k, v = (x.requires_grad_() for x in random_qkv())
    output = document_attention(q, k, v, BOUNDARIES, LENGTHS)
    output[6:15].sum().backward()
    for x in (q, k, v):
        assert x.grad[6:15].abs().max() > 0
        x.grad[6:15] = 0
        assert torch.equal(x.grad, torch.zeros_like(x.grad))
    with torch.no_grad():
        for x in (q, k, v):
            x[:6] = 1e6
        changed = document_attention(q, k, v, BOUNDARIES, LENGTHS)
    assert torch.equal(changed[6:], output[6:])
    assert not torch.equal(changed[:6], output[:6])


def test_boundaries_that_are_forgotten_show():
    q, k, v = random_qkv()
    merged = document_attention(q, k, v, torch.tensor([0, 17], dtype=torch.int32), [17])
    separate = document_attention(q, k, v, BOUNDARIES, LENGTHS)
    torch.testing.assert_close(merged[:5], separate[:5], rtol=0, atol=1e-12)
    assert (merged[5:] - separate[5:]).abs().max() > 0.1


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_comes_back_as_bfloat16_and_is_computed_in_float32(autocast):
    q, k, v = random_qkv(dtype=torch.bfloat16)
    exact = textbook(q.double(), k.double(), v.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = document_attention(q, k, v, BOUNDARIES, LENGTHS)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, exact.bfloat16())


def test_rotation_is_that_of_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k, _ = random_qkv(dtype=torch.float32)
    positions = torch.tensor([0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1000])
    cos, sin = rotary_angles(positions, head_dim=8, theta=10000.0)
    wide = [torch.cat([x.squeeze(1)] * 2, dim=-1)[None] for x in (cos, sin)]
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], *wide)
    for x, reference in zip((q, k), expected, strict=True):
        torch.testing.assert_close(rotate(x, cos, sin), reference[0].transpose(0, 1), rtol=0, atol=1e-6)
    assert torch.equal(rotate(q, cos, sin)[5], q[5]) and not torch.equal(rotate(q, cos, sin)[4], q[4])


def test_rotated_products_depend_on_the_distance_alone():
    x = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(1))
    products = []
    for shift in (0, 3):
        a, b = rotate(x, *rotary_angles(torch.tensor([2 + shift, 7 + shift]), 8, 100.0))
        products.append((a * b).sum())
    torch.testing.assert_close(*products, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 3])
def test_the_varlen_kernel_agrees_with_the_textbook(window):
    q, k, v = (x.cuda().requires_grad_() for x in random_qkv(dtype=torch.bfloat16))
    output = document_attention(q, k, v, BOUNDARIES.cuda(), LENGTHS, window=window)
    expected = textbook(*(x.detach().double().cpu() for x in (q, k, v)), window=window)
    torch.testing.assert_close(output.double().cpu(), expected, rtol=0, atol=3e-2)
    output[6:15].sum().backward()
    assert all(torch.equal(x.grad[:6], torch.zeros_like(x.grad[:6])) for x in (q, k, v))
    assert all(x.grad[6:15].abs().max() > 0 for x in (q, k, v))
