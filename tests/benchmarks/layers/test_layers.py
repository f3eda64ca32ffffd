"""Cases, variants and limits of layers and models; the compute without communication; the original's table."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common.cases import CONTRACT
from benchmarks.layers.alone import ComputeAlone
from benchmarks.layers.cases import (
    FSDP_ULYSSES,
    LAYER_TARGETS,
    PIPELINED,
    TORCH_TP_SP,
    LayerCase,
    Variant,
    check_heads,
    make_layer_cases,
    make_variants,
    pick_variants,
)
from benchmarks.layers.original import ORIGINAL, split_measured
from benchmarks.layers.ranks import expected_traffic
from odysseus_kernels.planner.formulas import STRATEGIES

SMALL = LayerCase("small", "layer", 32, 64, 96, 4, 2)


def _config(case: LayerCase) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        max_position_embeddings=case.tokens,
        attn_implementation="sdpa",
    )


def test_cases_have_the_contract_and_divide() -> None:
    contract = [case for case in make_layer_cases("layer", 2) if case.label == CONTRACT]
    assert [(case.tokens, case.hidden, case.kv_heads == case.heads) for case in contract] == [
        (4096, 512, True),
        (8192, 1024, True),
    ]
    for world, ring in ((3, 1), (4, 2), (6, 3)):
        for level in ("layer", "model"):
            for case in make_layer_cases(level, world, ring=ring):  # type: ignore[arg-type]
                assert case.tokens % world == 0
                assert ring == 1 or case.tokens % (2 * ring * world // ring) == 0
    with pytest.raises(ValueError, match="is found in no row"):
        make_layer_cases("layer", 2, pattern="nothing")
    with pytest.raises(ValueError, match="not a regular expression"):
        make_layer_cases("layer", 2, pattern="(")
    with pytest.raises(ValueError, match=r"2 ranks do not divide its 1 key/value heads of 64; .* that 128 divides"):
        check_heads(make_layer_cases("layer", 2, shapes=[(128, 64)]), 2)
    with pytest.raises(ValueError, match="3 ranks do not divide its 8 key/value heads"):
        check_heads(make_layer_cases("layer", 3), 3)


def test_variants_stand_beside_their_compute_alone() -> None:
    variants = make_variants(STRATEGIES, ("symmetric", "collective"), ring=2, peers=(TORCH_TP_SP, FSDP_ULYSSES))
    names = [variant.name for variant in variants]
    assert len(set(names)) == len(names) == 2 * 5 * 5 + 2
    assert {variant.alone for variant in variants} <= set(names)
    assert "odysseus+ring2 fused symmetric" in names
    kept = make_variants(STRATEGIES, ("symmetric",), gathered=("regather", "save"))
    assert [v.name for v in kept if v.gathered == "save"] == [
        "tp_sp unfused symmetric save",
        "tp_sp fused symmetric save",
        "odysseus unfused symmetric save",
        "odysseus fused symmetric save",
    ]
    pipelined = [v.name for v in make_variants(STRATEGIES, ("symmetric",), pipeline=8) if v.pipeline]
    assert pipelined == [f"{strategy} pipelined symmetric" for strategy in STRATEGIES if strategy in PIPELINED]
    assert "ulysses pipelined symmetric" in pipelined
    ringed = [v.family for v in make_variants(("ulysses", "tp_sp"), ("symmetric",), ring=2, pipeline=8) if v.pipeline]
    assert ringed == ["ulysses", "tp_sp", "tp_sp+ring2"], "no groups of heads beside a ring"
    assert {target.variant for target in LAYER_TARGETS} | {target.base for target in LAYER_TARGETS} <= {
        *names,
        *pipelined,
    }
    chosen = [v for v in make_variants(STRATEGIES, ("symmetric",), auto=True) if v.mode == "auto"]
    assert [(v.name, v.alone, v.pipeline) for v in chosen] == [
        (f"{strategy} auto symmetric", f"{strategy} alone", "auto") for strategy in STRATEGIES
    ]
    limits = {(t.hidden, t.variant, t.base): t.limit for t in LAYER_TARGETS}
    assert limits[512, "odysseus fused symmetric", "odysseus alone"] == 1.08
    assert limits[1024, "tp_sp fused symmetric", "tp_sp alone"] == 1.06
    assert limits[1024, "odysseus pipelined symmetric", "odysseus fused symmetric"] == 1.03


def test_variants_are_picked_with_their_compute_alone() -> None:
    variants = make_variants(("tp_sp", "odysseus"), ("collective",), peers=(TORCH_TP_SP,), pipeline=8)
    assert pick_variants(variants, "") == variants
    assert [v.name for v in pick_variants(variants, "odysseus pipelined|torch")] == [
        "tp_sp alone",  # what a peer stands beside
        "odysseus alone",
        "odysseus pipelined collective",
        TORCH_TP_SP,
    ]
    with pytest.raises(ValueError, match=r"found in no name; the names are\n  tp_sp unfused collective"):
        pick_variants(variants, "alone")
    with pytest.raises(ValueError, match="not a regular expression"):
        pick_variants(variants, "(")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("world", "ring"), ((1, 1), (2, 1), (4, 1), (2, 2)))
def test_compute_alone_is_one_ranks_share(strategy: str, world: int, ring: int) -> None:
    twin = ComputeAlone(SMALL, strategy, world, ring, _config(SMALL), torch.float32)
    with FlopCounterMode(display=False) as counter:
        twin.step()
    products = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
    query_and_output, key_and_value = 2 * 64 * 64, 2 * 64 * 32
    if world > SMALL.kv_heads and strategy not in ("ulysses", "tsp"):
        key_and_value *= world // SMALL.kv_heads  # ranks share a head, and each projects it
    weights = query_and_output + key_and_value + 3 * 64 * 96
    assert products == 6 * 32 * weights // (world * ring)
    assert all(p.grad is not None for p in twin.layers.parameters())
    assert twin.input.grad is not None
    assert twin.input.grad.shape[1] == 32 // ring // (1 if strategy == "tp" else world)


@pytest.mark.parametrize("strategy", ("tp", "ulysses", "tsp"))
def test_compute_alone_of_one_rank_is_the_stock_layer(strategy: str) -> None:
    # Where nothing stands for something gathered, its numbers do mean something.
    torch.manual_seed(0)
    stock = LlamaForCausalLM(_config(SMALL)).model
    twin = ComputeAlone(SMALL, strategy, 1, 1, _config(SMALL), torch.float32)
    layer, own = stock.layers[0], twin.layers[0]
    pairs = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
    with torch.no_grad():
        for name, stock_name in pairs.items():
            getattr(own, name).copy_(getattr(layer.self_attn, stock_name).weight)
        for name in ("gate", "up", "down"):
            getattr(own, name).copy_(getattr(layer.mlp, f"{name}_proj").weight)
    twin.step()
    leaf = twin.input.detach().clone().requires_grad_()
    stock(inputs_embeds=leaf, use_cache=False).last_hidden_state.backward(twin.grad)
    torch.testing.assert_close(twin.input.grad, leaf.grad)


def test_compute_alone_of_a_model() -> None:
    case = LayerCase("small", "model", 32, 64, 96, 4, 4, layers=2, vocabulary=40)
    for strategy in STRATEGIES:
        twin = ComputeAlone(case, strategy, 2, 1, _config(case), torch.float32)
        twin.step()
        assert twin.head.shape[0] == (20 if strategy in ("tp", "tp_sp") else 40)
        assert all(p.grad is not None for p in twin.parameters())


def test_expected_traffic_of_a_model_has_all_its_parts() -> None:
    layer = LayerCase("small", "layer", 32, 64, 96, 4, 4)
    model = LayerCase("small", "model", 32, 64, 96, 4, 4, layers=3, vocabulary=40)
    odysseus = Variant("odysseus fused symmetric", "ours", "odysseus", mode="fused", transport="symmetric")
    one, three = (expected_traffic(case, odysseus, 2, 4) for case in (layer, model))
    gathered = ("forward", "all_gather_linear", "all_gather")
    assert three[gathered] == 3 * one[gathered]
    weights = ("forward", "zero3_linear", "all_gather")
    assert three[weights] == 3 * one[weights]
    assert three["forward", "zero3_linear_cross_entropy", "all_gather"] == 40 * 64 * 4 // 2
    # Norms: two in each layer and one behind them, all-reduced (2 f S); then the embedding.
    norms = ("backward", "replicated_parameter", "all_reduce")
    assert one[norms] == 3 * 64 * 4
    assert three[norms] == 7 * 64 * 4 + 40 * 64 * 4


def test_original_table_is_complete_and_measured_bytes_split() -> None:
    assert [row.strategy for row in ORIGINAL] == [name for name in STRATEGIES if name != "tsp"]  # which is younger
    assert all(len(row.cells) == 7 and row.wrong for row in ORIGINAL)
    assert [row.activations(10, 2, 3) for row in ORIGINAL] == [80, 80, 80, 40]
    assert [row.weights(10, 2, 3) for row in ORIGINAL] == [0, 0, 28, 12]
    recorded = {
        "forward all_gather_linear all_gather": 5,
        "backward zero3_linear reduce_scatter": 7,
        "forward linear_all_to_all all_gather": 11,
        "forward linear_all_to_all all_to_all": 13,
        "backward pipelined_ulysses reduce_scatter": 19,
        "backward pipelined_ulysses all_to_all": 23,
        "backward replicated_parameter all_reduce": 17,
    }
    assert split_measured(recorded) == {"activations": 41, "weights": 54}
