"""Bytes and memory of strategies against the table of COMMUNICATION formulas, with numbers worked out by hand."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest

from odysseus_kernels.planner import ring as rings
from odysseus_kernels.planner.formulas import (
    STRATEGIES,
    LayerShape,
    Traffic,
    head_traffic,
    replicated_traffic,
    traffic,
)
from odysseus_kernels.planner.memory import head_saved, saved
from odysseus_kernels.planner.ring import RingPeers, busiest_peers, parts_in_sight, ring_peers

# d = 64, q = 64, dk = 64, i = 96: Ld = 4096 at L = 64; Pf = 3 * 64 * 96 = 18432; Pa = 4 * 64 * 64 = 16384.
MHA = LayerShape(hidden=64, intermediate=96, heads=8, kv_heads=8, head_dim=8)
# dk = 16: Pa = 2 * 64 * (64 + 16) = 10240.
GQA = LayerShape(hidden=64, intermediate=96, heads=8, kv_heads=2, head_dim=8)
# m = 2: Pf = 12288.
PLAIN = LayerShape(hidden=64, intermediate=96, heads=8, kv_heads=8, head_dim=8, gated=False)
L = 64


def elements(sent: Traffic, *phases: str) -> int:
    """Elements sent in ``phases`` for everything but norms, which the table leaves out."""
    return sum(n for (phase, operator, _), n in sent.items() if phase in phases and operator != "replicated_parameter")


def of(shape: LayerShape, strategy: str, world: int, **others: object) -> Traffic:
    return traffic(shape, strategy, world, tokens=L, element_size=1, **others)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "strategy", "gathered", "forward", "backward"),
    [
        # f = 3/4: 4Ld = 16384 -> 12288; 6Ld -> 18432; 2Ld -> 6144; 3Ld -> 9216; Pf -> 13824; Pa -> 12288.
        (MHA, "tp", "regather", 12288, 12288),
        (MHA, "tp_sp", "save", 12288, 12288),
        (MHA, "tp_sp", "regather", 12288, 18432),
        (MHA, "odysseus", "save", 6144 + 13824, 6144 + 2 * 13824),
        (MHA, "odysseus", "regather", 6144 + 13824, 9216 + 2 * 13824),
        # 2(L/N)(d + k) f = 2 * 16 * 128 * 3/4 = 3072.
        (MHA, "ulysses", "regather", 3072 + 12288 + 13824, 3072 + 2 * (12288 + 13824)),
        # Two heads on four ranks: k = N * head_dim = 32; 2 * 16 * 96 * 3/4 = 2304; Pa f = 7680.
        (GQA, "ulysses", "regather", 2304 + 7680 + 13824, 2304 + 2 * (7680 + 13824)),
        (GQA, "tp_sp", "regather", 12288, 18432),
        # 2 L dk f = 2 * 64 * 64 * 3/4 = 6144 of k and v, and of their gradients, which are in fp32.
        (MHA, "tsp", "regather", 6144 + 12288 + 13824, 5 * 6144 + 2 * (12288 + 13824)),
        # Two heads stay two heads on four ranks: 2 * 64 * 16 * 3/4 = 1536.
        (GQA, "tsp", "regather", 1536 + 7680 + 13824, 5 * 1536 + 2 * (7680 + 13824)),
        # Plain: Pf f = 9216.
        (PLAIN, "odysseus", "regather", 6144 + 9216, 9216 + 2 * 9216),
    ],
)
def test_the_table_at_four_ranks(shape: LayerShape, strategy: str, gathered: str, forward: int, backward: int) -> None:
    sent = of(shape, strategy, 4, gathered=gathered)
    assert elements(sent, "forward") == forward
    assert elements(sent, "backward") == backward


def test_collectives_of_tp_sp_and_odysseus() -> None:
    # In all, per layer: TP-SP 6 AG + 4 RS of Ld, Odysseus 3 AG + 2 RS of Ld and 2 AG + 1 RS of Pf.
    for strategy, gathers, scatters, weights in (("tp_sp", 6, 4, 0), ("odysseus", 3, 2, 1)):
        sums: Counter[str] = Counter()
        for (_, operator, collective), count in of(MHA, strategy, 2).items():
            if operator != "replicated_parameter":
                sums[collective] += 2 * count  # f = 1/2
        assert sums["all_gather"] == gathers * 4096 + weights * 2 * 18432
        assert sums["reduce_scatter"] == scatters * 4096 + weights * 18432


def test_ring_with_zero3_weights() -> None:
    # R = 4 and one rank of seq: 2 L dk f = 2 * 64 * 16 * 3/4 = 1536 of k and v each way, and as many gradients, which
    # are in fp32 where elements are narrower.
    sent = of(GQA, "ulysses", 1, ring=4)
    assert sent["forward", "ring_attention", "send_recv"] == 1536
    assert sent["backward", "ring_attention", "send_recv"] == 1536 + 4 * 1536
    for size, wide in ((2, 4), (4, 4), (8, 8)):
        sized = traffic(GQA, "ulysses", 1, tokens=L, ring=4, element_size=size)
        assert sized["backward", "ring_attention", "send_recv"] == (size + wide) * 1536
    assert not any(collective == "all_to_all" for _, _, collective in sent)
    assert elements(sent, "forward") == 1536 + (10240 + 18432) * 3 // 4
    assert elements(sent, "backward") == 5 * 1536 + 2 * (10240 + 18432) * 3 // 4


def test_ring_under_a_window() -> None:
    # R = 4: blocks of 8 tokens, in zigzag order 0 and 7, 1 and 6, 2 and 5, 3 and 4.
    ranks = range(4)

    def peers(window: int | None, layout: str = "zigzag") -> list[RingPeers]:
        parts = parts_in_sight(4, 16, layout, causal=True, window=window)
        return [ring_peers(parts, rank) for rank in ranks]

    assert peers(1) == [(0, 0)] * 4  # every query sees itself only
    # A query sees its own block and the one before: each rank one block of each neighbour; rank 3's two are neighbours.
    half = Fraction(1, 2)
    assert peers(2) == peers(9) == [(half, half), (1, 1), (1, 1), (half, half)]
    # And the first token of it the last of the one before that: rank 2's late block both of rank 3's.
    assert peers(10) == [(1, 1), (3 * half, 3 * half), (3 * half, 2), (3 * half, 1)]
    assert peers(64) == peers(None) == [(3, 3)] * 4
    # All but the first key: the late blocks of ranks before have not been seen by anybody in any case.
    assert peers(63) == [(3 * half, 3), (2, 5 * half), (5 * half, 2), (3, 3 * half)]
    assert busiest_peers(4, 64, 9) == (1, 1) and busiest_peers(4, 64, None) == busiest_peers(4, 64, 64) == (3, 3)
    assert busiest_peers(4, 64, 10) == (3 * half, 2) and busiest_peers(1, 64, 9) == (0, 0)
    # What travels in 4 bytes weighs more, or in as many as what it is the gradient of.
    assert busiest_peers(4, 64, 63, 2) == busiest_peers(4, 64, 63, 4) == (3, 3 * half)
    # In one block each, a rank sees those before it; with a window of at most a block the one before.
    assert peers(None, "contiguous") == [(3, 0), (2, 1), (1, 2), (0, 3)]
    assert peers(17, "contiguous") == [(1, 0), (1, 1), (1, 1), (0, 1)]
    # 16 tokens of k and v of width 16 to each of two ranks that see them, and gradients in fp32 to one.
    for strategy, world, ring in (("ulysses", 1, 4), ("tsp", 2, 2)):
        sent = traffic(GQA, strategy, world, tokens=L, ring=ring, element_size=2, ring_peers=RingPeers(2, 1))
        assert sent["forward", "ring_attention", "send_recv"] == 2 * 512 * 2
        assert sent["backward", "ring_attention", "send_recv"] == 2 * 512 * 2 + 512 * 4
        alone = traffic(GQA, strategy, world, tokens=L, ring=ring, ring_peers=RingPeers(0, 0))
        assert not any(operator == "ring_attention" for _, operator, _ in alone)
        # Half of the tokens to one and all to another; gradients of a quarter of another's.
        some = RingPeers(3 * half, half / 2)
        sent = traffic(GQA, strategy, world, tokens=L, ring=ring, element_size=2, ring_peers=some)
        assert sent["forward", "ring_attention", "send_recv"] == 3 * 256 * 2
        assert sent["backward", "ring_attention", "send_recv"] == 3 * 256 * 2 + 128 * 4
    # Keys and values that are gathered at once do not go round.
    eager = {"tokens": L, "keys_at_once": True}
    assert traffic(GQA, "tsp", 4, **eager, ring_peers=RingPeers(1, 1)) == traffic(GQA, "tsp", 4, **eager)


def test_tsp_is_one_ring_of_all_ranks() -> None:
    whole = of(GQA, "tsp", 4)
    assert whole == of(GQA, "tsp", 2, ring=2) == of(GQA, "tsp", 1, ring=4)
    # Ulysses with one rank of seq sends the same, under other operators' names.
    assert sum(whole.values()) == sum(of(GQA, "ulysses", 1, ring=4).values())
    # Heads that do not divide: 6 on four ranks.
    assert traffic(LayerShape(64, 96, 6, 3, 8), "tsp", 4, tokens=L)["forward", "ring_attention", "send_recv"] == (
        4 * 2 * 64 * 24 * 3 // 4
    )
    # An attention function that takes all keys at once: gathered forward, and kept; gradients in fp32.
    eager = of(GQA, "tsp", 4, keys_at_once=True)
    assert eager["forward", "gathered_key_value", "all_gather"] == 1536
    assert eager["backward", "gathered_key_value", "reduce_scatter"] == 4 * 1536
    assert sum(whole.values()) - sum(eager.values()) == 1536


def test_hybrid_cuts_zero3_over_all_and_sums_other_weights_over_the_ring() -> None:
    # 2 x 2: T = 32 tokens of each ring rank. AG + RS of T d = 2048 at f = 1/2; Pf at 3/4.
    sent = of(MHA, "odysseus", 2, ring=2)
    assert sent["forward", "all_gather_linear", "all_gather"] == 1024
    assert sent["forward", "zero3_linear", "all_gather"] == 18432 * 3 // 4
    # k and v of 32 tokens and half of the heads, to one peer.
    assert sent["forward", "ring_attention", "send_recv"] == 2 * 32 * 32
    # All-reduce of half of Pa over two ranks, and of two norms over four: 2 * 3 * 16 each.
    assert sent["backward", "replicated_parameter", "all_reduce"] == 16384 // 2 + 2 * 96
    tp = of(MHA, "tp", 2, ring=2)
    # All weights, and norms over the ring: 2 * 1 * 32 each.
    assert tp["backward", "replicated_parameter", "all_reduce"] == (16384 + 18432) // 2 + 2 * 64


def test_norms_biases_and_shared_heads() -> None:
    assert ("backward", "replicated_parameter", "all_reduce") not in of(MHA, "tp", 4)
    assert of(MHA, "tp_sp", 4)["backward", "replicated_parameter", "all_reduce"] == 2 * (2 * 3 * 16)
    # k and v weights [16, 64] whole on every rank: 2 * 3/4 * 1024 each.
    shared = of(GQA, "tp_sp", 4)["backward", "replicated_parameter", "all_reduce"]
    assert shared == 2 * (2 * 3 * 16) + 2 * 1536
    # Padded to a multiple of the ranks: 2 * 2 * ceil(64 / 3).
    odd = LayerShape(hidden=64, intermediate=96, heads=6, kv_heads=6, head_dim=8)
    assert replicated_traffic(64, "tp_sp", 3, element_size=1) == {
        ("backward", "replicated_parameter", "all_reduce"): 88
    }
    assert traffic(odd, "tp_sp", 3, tokens=66)["backward", "replicated_parameter", "all_reduce"] == 2 * 88 * 4
    biased = LayerShape(64, 96, 8, 8, 8, gated=False, qkv_bias=True, out_bias=True, mlp_bias=True, norm_bias=True)
    plain, more = of(PLAIN, "odysseus", 4), of(biased, "odysseus", 4)
    difference = {key: more[key] - plain[key] for key in more if more[key] != plain[key]}
    # Biases of up and down (96 + 64): gathered once, reduced in fp32; biases of norms; those of attention stay here.
    assert difference == {
        ("forward", "zero3_linear", "all_gather"): 3 * 40,
        ("backward", "zero3_linear", "reduce_scatter"): 3 * 40 * 4,
        ("backward", "replicated_parameter", "all_reduce"): 2 * 96,
    }


def test_one_rank_sends_nothing_and_sizes_scale() -> None:
    for strategy in STRATEGIES:
        assert traffic(MHA, strategy, 1, tokens=L) == {}
        one, four = of(MHA, strategy, 2), traffic(MHA, strategy, 2, tokens=L, element_size=4)
        # Keys, values and their gradients, which are in fp32 either way: 1 + 4 bytes, then 4 + 4.
        mixed = ("backward", "ring_attention", "send_recv")
        assert four == {key: count // 5 * 8 if key == mixed else 4 * count for key, count in one.items()}


def test_checkpointing_repeats_the_forward() -> None:
    once, twice = of(MHA, "odysseus", 4), of(MHA, "odysseus", 4, checkpointing=True)
    assert elements(twice, "forward") == 2 * elements(once, "forward")
    assert elements(twice, "backward") == elements(once, "backward")


def test_heads_and_losses() -> None:
    # ZeRO-3: 3 V d f = 3 * 128 * 64 * 3/4; and the sum and count of the loss: 2 * 3 ranks * 8 bytes.
    sent = head_traffic(128, 64, "odysseus", 4, tokens=L, element_size=1)
    assert sent.pop(("forward", "sequence_loss", "all_reduce")) == 2 * 3 * 8
    assert sum(sent.values()) == 3 * 128 * 64 * 3 // 4
    name = "vocab_parallel_linear_cross_entropy"
    # s = 32 tokens of d = 64 to one peer and back, and for each of them a label, two statistics, one logsumexp.
    assert head_traffic(128, 64, "tp_sp", 2, tokens=L) == {
        ("forward", name, "all_gather"): 32 * 64 * 4 + 32 * 8,
        ("forward", name, "all_to_all"): 32 * 2 * 4,
        ("backward", name, "all_gather"): 32 * 64 * 4 + (32 + 1) * 4,
        ("backward", name, "reduce_scatter"): 32 * 64 * 4,
        ("forward", "sequence_loss", "all_reduce"): 16,
    }
    assert head_traffic(128, 64, "tp", 2, tokens=L) == {
        ("forward", name, "all_gather"): 64 * 2 * 4,
        ("backward", name, "all_reduce"): 2 * 32 * 64 * 4,
    }
    # Rows that the ranks do not divide: whole on all of them, gradients all-reduced.
    odd = head_traffic(127, 64, "odysseus", 2, tokens=L, element_size=1)
    assert odd["backward", "replicated_parameter", "all_reduce"] == 127 * 64
    # Tied to the embedding: the same, whatever the ranks divide; the embedding's gradient comes on top.
    for strategy, different in (("odysseus", 2), ("tp_sp", 2), ("tp", 1)):
        tied = head_traffic(128, 64, strategy, 2, tokens=L, element_size=1, tied=True)
        assert tied.get(("backward", "replicated_parameter", "all_reduce"), 0) == 128 * 64 * (different - 1)
    with pytest.raises(ValueError, match="strategy: expected"):
        head_traffic(128, 64, "other", 2, tokens=L)


@pytest.mark.parametrize(
    ("strategy", "gathered", "expected"),
    [
        # s = 16: s (6d + 2dk + 3i) = 16 * (384 + 128 + 288) = 12800; and what the strategy keeps beyond.
        ("tp_sp", "regather", 12800),
        ("odysseus", "regather", 12800),
        ("ulysses", "regather", 12800 + 16 * 64),
        ("tsp", "regather", 12800),
        ("tp_sp", "save", 12800 + 2 * 3 * 16 * 64),
        ("odysseus", "save", 12800 + 3 * 16 * 64),
        ("tp", "regather", 12800 + 4 * 3 * 16 * 64),
    ],
)
def test_saved_for_backward_at_four_ranks(strategy: str, gathered: str, expected: int) -> None:
    kept = saved(MHA, strategy, 4, tokens=L, gathered=gathered, fused_activation=True, stock_norms=False)  # type: ignore[arg-type]
    assert kept.pop("log-sum-exp") == 64 * 2 * 4
    assert sum(kept.values()) == 4 * expected
    stock = saved(MHA, strategy, 4, tokens=L, gathered=gathered)  # type: ignore[arg-type]
    rows = 64 if strategy == "tp" else 16
    # An unfused SwiGLU keeps one more of i; a stock norm its normalised input and one number for each token.
    assert sum(stock.values()) - stock["log-sum-exp"] == 4 * (expected + 16 * 96 + 2 * rows * 65)


def test_saved_of_a_ring_is_that_of_as_many_ranks() -> None:
    parts = saved(MHA, "odysseus", 2, tokens=L, ring=2)
    assert parts == saved(MHA, "odysseus", 4, tokens=L)
    assert saved(MHA, "tp_sp", 4, tokens=L, checkpointing=True)["activations"] == 16 * 64 * 4
    # Two key/value heads on four ranks: each keeps one, as if there were four.
    assert saved(GQA, "tp_sp", 4, tokens=L)["activations"] == 4 * 16 * (6 * 64 + 2 * 32 + 4 * 96)
    # Under tsp each keeps both, of its own tokens.
    assert saved(GQA, "tsp", 4, tokens=L)["activations"] == 4 * 16 * (6 * 64 + 2 * 16 + 4 * 96)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("other", 2, 64, 1, "regather"), "strategy: expected one of"),
        (("tp", 3, 66, 1, "regather"), "query heads"),
        (("tp", 2, 63, 1, "regather"), "tokens: expected a multiple of 1 x 2"),
        (("tp", 2, 64, 0, "regather"), "at least 1"),
        (("tp", 2, 64, 1, "keep"), "gathered: expected"),
    ],
)
def test_bad_input(arguments: tuple[str, int, int, int, str], message: str) -> None:
    strategy, world, tokens, ring, gathered = arguments
    with pytest.raises(ValueError, match=message):
        traffic(MHA, strategy, world, tokens=tokens, ring=ring, gathered=gathered)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="norms of queries and keys"):
        saved(LayerShape(64, 96, 8, 8, 8, qk_norm=True), "tp", 2, tokens=64)
    with pytest.raises(ValueError, match="3 ranks divide"):
        traffic(LayerShape(64, 100, 6, 6, 8), "odysseus", 3, tokens=66)


def test_a_head_keeps_no_logits():
    # 16 of 64 tokens: hidden states in 4 bytes, target and number of the token in 8, log-sum-exp in 4.
    assert head_saved(64, "odysseus", 4, tokens=L) == head_saved(64, "ulysses", 2, tokens=L, ring=2) == 16 * (256 + 20)
    assert head_saved(64, "tp", 4, tokens=L, element_size=2) == 64 * (128 + 20)
    assert head_saved(64, "tp_sp", 4, tokens=L) == 16 * (256 + 20) + 8 * 64


@pytest.mark.parametrize("tile", (1, 3, 512))
@pytest.mark.parametrize("world", (1, 2, 3, 4, 5, 8))
def test_the_busiest_rank_of_a_ring_is_that_of_its_parts(
    monkeypatch: pytest.MonkeyPatch, world: int, tile: int
) -> None:
    monkeypatch.setattr(rings, "TILE", tile)
    for rows in (2, 6, 14):
        for window in (None, *range(1, rows * world + 3)):
            parts = parts_in_sight.__wrapped__(world, rows, "zigzag", causal=True, window=window)
            everyone = [ring_peers(parts, rank) for rank in range(world)]
            for size in (2, 4, 8):
                found = busiest_peers(world, rows * world, window, size)
                assert found in everyone
                sent = [2 * size * peers.served + max(4, size) * peers.visited for peers in (found, *everyone)]
                assert sent[0] == max(sent), (rows, window, size)


def test_the_busiest_rank_of_ten_thousand_is_found_at_once() -> None:
    # Blocks of 50000 tokens, a window that ends in the third one on: what four ranks beside get of each block.
    ranks, size = 10_000, 50_000
    end = size - (3 * size - 120_000 + 1) // 512 * 512
    per_block = Fraction(2 * size + end, 2 * size)
    assert busiest_peers(ranks, 2 * size * ranks, 120_000) == (2 * per_block, 2 * per_block)
