"""Attention with log-sum-exp on one device: kernel and products against fp64."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from odysseus_kernels.attention import local
from odysseus_kernels.attention.dropout import Dropout
from odysseus_kernels.attention.local import attend, attend_backward, check_attention_kernel
from odysseus_kernels.errors import FallbackWarning
from odysseus_kernels.testing.compare import assert_close_to_truth, max_error

B, HEADS, KV_HEADS, ROWS, KEYS, WIDTH = 2, 6, 2, 33, 47, 16


def inputs(dtype: torch.dtype) -> list[Tensor]:
    """q, k, v for some keys; other keys and values that the queries see, too; the output's gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((HEADS, ROWS), (KV_HEADS, KEYS), (KV_HEADS, KEYS), (KV_HEADS, 9), (KV_HEADS, 9), (HEADS, ROWS))
    return [
        # Slices of something larger, as blocks of a rank are.
        torch.randn(B, heads, n + 3, WIDTH, generator=generator, dtype=torch.float64).to(dtype)[:, :, :n]
        for heads, n in shapes
    ]


def some_mask() -> Tensor:
    """Rows that see all, some and, every fifth, nothing."""
    mask = torch.rand(B, ROWS, KEYS, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[:, ::5] = False
    mask[:, 1::5] = True
    return mask


def parts(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    scores = q @ k.repeat_interleave(HEADS // KV_HEADS, 1).mT * scale
    return scores if mask is None else scores.masked_fill(~mask[:, None], -math.inf)


@pytest.mark.parametrize("by_products", (False, True), ids=("kernel", "products"))
@pytest.mark.parametrize("masked", (False, True), ids=("whole", "masked"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_share_of_some_keys(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, masked: bool, by_products: bool
) -> None:
    """Forward alone; backward as the share in attention to these keys and to others, whose gradients come from fp64."""
    if by_products:
        monkeypatch.setattr(local, "_why_products", lambda *_: "a test")
        monkeypatch.setattr(local, "_MOST_PROBABILITIES", 500)  # several parts of rows and heads
        monkeypatch.setattr(local, "_FEWEST_ROWS", 4)
    mask, scale = some_mask() if masked else None, 0.3
    q, k, v, other_k, other_v, grad = inputs(dtype)
    out, lse = attend(q, k, v, scale=scale, mask=mask)
    wide = [x.double().requires_grad_() for x in (q, k, v, other_k, other_v)]
    scores = parts(wide[0], wide[1], scale, mask)
    expected = torch.logsumexp(scores, -1).detach()
    blind = expected == -math.inf
    assert torch.equal(lse == -math.inf, blind)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # The kernel adds exponentials that it has rounded to 16 bits.
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5 if dtype == torch.float32 or by_products else 2e-3
    assert max_error(lse.masked_fill(blind, 0), expected.masked_fill(blind, 0)) <= tolerance
    values = wide[2].repeat_interleave(HEADS // KV_HEADS, 1)
    alone = scores.softmax(-1).masked_fill(blind[..., None], 0) @ values
    # Products keep 16-bit results in fp32: nothing is rounded, so what fp32 explains is enough of an allowance.
    wanted = out.dtype
    assert wanted in (dtype, lse.dtype)
    assert_close_to_truth(out, alone.detach(), dtype=wanted, terms=64, roundings=2, name="output")

    everything = torch.cat((scores, parts(wide[0], wide[3], scale, None)), -1)
    all_values = torch.cat((wide[2], wide[4]), 2).repeat_interleave(HEADS // KV_HEADS, 1)
    result = everything.softmax(-1) @ all_values
    # The share in dq of these keys: scores of the others held constant.
    everything_but = torch.cat(
        (parts(wide[0], wide[1], scale, mask), parts(wide[0].detach(), wide[3], scale, None)), -1
    )
    share = everything_but.softmax(-1) @ all_values
    truths = torch.autograd.grad(share, wide[:3], grad.double())
    global_lse = torch.logsumexp(everything, -1).detach().to(lse.dtype)
    global_out = result.detach().to(dtype)
    results = attend_backward(grad, q, k, v, global_out, global_lse, scale=scale, mask=mask)
    names = ("query gradient", "key gradient", "value gradient")
    for name, one, expected_gradient in zip(names, results, truths, strict=True):
        assert one.dtype in (dtype, lse.dtype)
        # ``global_out`` is rounded to the type either way; probabilities and their gradients as well in the kernel.
        assert_close_to_truth(one.to(dtype), expected_gradient, dtype=dtype, terms=64, roundings=3, name=name)


@pytest.mark.parametrize("by_products", (False, True), ids=("kernel", "products"))
def test_causal(monkeypatch: pytest.MonkeyPatch, by_products: bool) -> None:
    if by_products:
        monkeypatch.setattr(local, "_why_products", lambda *_: "a test")
    q, k, v, *_, grad = (x[:, :, :ROWS] for x in inputs(torch.float64))
    mask = torch.ones(1, ROWS, ROWS, dtype=torch.bool).tril()
    out, lse = attend(q, k, v, scale=0.3, causal=True)
    other, other_lse = attend(q, k, v, scale=0.3, mask=mask)
    torch.testing.assert_close((out, lse), (other, other_lse), rtol=1e-12, atol=1e-12)
    one, two = (
        attend_backward(grad, q, k, v, out, lse, scale=0.3, **kind) for kind in ({"causal": True}, {"mask": mask})
    )
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_products_hold_few_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_MOST_PROBABILITIES", 1000)
    q, k, *_ = inputs(torch.float64)
    found = list(local._parts(q, k))
    covered = torch.zeros(HEADS, ROWS)
    for _, heads, rows in found:
        covered[heads, rows] += 1
        assert B * (heads.stop - heads.start) * (rows.stop - rows.start) * KEYS <= 1000
    assert (covered == 1).all()


def test_dropout_factors() -> None:
    """As often as asked, without visible structure, and by position: any cut gives the same."""
    where = torch.arange(256)
    whole = Dropout(0.25, 3, 0, where, where).factors(2, slice(0, 4), slice(0, 256), torch.float64)
    assert set(whole.unique().tolist()) == {0.0, 1 / 0.75}
    kept = (whole > 0).double()
    # 524288 draws: the standard deviation of the mean is 0.0006; 1024 in each row of all heads and 256 of one row.
    assert abs(kept.mean().item() - 0.75) < 0.003
    assert (kept.mean((0, 1, 3)) - 0.75).abs().max() < 6 * math.sqrt(0.75 * 0.25 / 2048)
    assert (kept.mean((0, 1, 2)) - 0.75).abs().max() < 6 * math.sqrt(0.75 * 0.25 / 2048)
    flat = kept.flatten(0, 1) - 0.75
    for one, other in ((flat[0], flat[1]), (flat[0], flat[4]), (flat[0, 1:], flat[0, :-1]), (flat[0], flat[0].mT)):
        correlation = (one * other).mean() / (0.75 * 0.25)
        assert abs(correlation.item()) < 6 / 256
    part = Dropout(0.25, 3, 2, where[100:], where[::3]).factors(2, slice(1, 2), slice(10, 20), torch.float64)
    assert torch.equal(part, whole[:, 3:4, 110:120, ::3])
    assert not torch.equal(whole, Dropout(0.25, 4, 0, where, where).factors(2, slice(0, 4), slice(0, 256), whole.dtype))


def test_products_instead_of_the_kernel_are_said_once() -> None:
    q, k, v, *_ = inputs(torch.float32)
    positions = torch.arange(ROWS), torch.arange(KEYS)
    local._warn_of_products.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attend(q, k, v, scale=0.3, mask=some_mask())  # the kernel's
        for _ in range(2):
            attend(q, k, v, scale=0.3, dropout=Dropout(0.2, 1, 0, *positions))
            attend(q, k, torch.cat((v, v), -1), scale=0.3)
    texts = [str(one.message) for one in caught if one.category is FallbackWarning]
    assert len(texts) == 2 and all('instead of kernel "sdpa"' in text for text in texts)
    assert "dropout" in texts[0] and "got 32 and 16" in texts[1]


def test_kernels_without_log_sum_exp_are_refused() -> None:
    check_attention_kernel("sdpa")
    for name in ("eager", "flex_attention", "flash_attention_3", "paged"):
        with pytest.raises(ValueError, match=f'"sdpa" or "flash_attention_2", got \'{name}\''):
            check_attention_kernel(name)


def test_flash_attention_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'package flash-attn.*"sdpa"'):
        check_attention_kernel("flash_attention_2")
    monkeypatch.setattr(local.importlib.util, "find_spec", lambda name: object())
    check_attention_kernel("flash_attention_2")
