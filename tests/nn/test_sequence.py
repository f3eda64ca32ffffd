"""Cutting batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from odysseus_kernels.nn.sequence import shard_sequence
from odysseus_kernels.strategies import STRATEGIES


def cut(
    rank: int, world_size: int, batch: dict[str, torch.Tensor], strategy: str = "odysseus", ring: int = 1
) -> dict[str, torch.Tensor]:
    if ring == 1:
        mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("seq",))
    else:
        mesh = init_device_mesh("cpu", (ring, world_size // ring), mesh_dim_names=("ring", "seq"))
    return shard_sequence(batch, mesh, strategy)


def refusals(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("seq",))
    ids = torch.zeros(2, 6, dtype=torch.int64)
    for batch, match in (
        ({"labels": ids}, r"expected input_ids .* got the keys \['labels'\]"),
        ({"input_ids": ids, "token_types": ids}, "got the keys"),
        ({"input_ids": ids[0]}, r"input_ids: expected shape \[batch, length\].* got \(6,\)"),
        ({"input_ids": ids[:, :0]}, "without empty dimensions"),
        ({"input_ids": ids.float()}, "input_ids: expected an integer dtype, got torch.float32"),
        ({"input_ids": ids, "labels": ids[:, 1:]}, r"labels: expected shape \(2, 6\) .* got \(2, 5\)"),
        ({"input_ids": ids, "labels": [[0]]}, "labels: expected a tensor, got list"),
        ({"input_ids": ids, "position_ids": ids[:, :3]}, "position_ids: expected shape"),
    ):
        with pytest.raises(ValueError, match=match):
            shard_sequence(batch, mesh)
    with pytest.raises(ValueError, match=r"strategy: expected one of \['odysseus', 'tp', .*\], got 'ring'"):
        shard_sequence({"input_ids": ids}, mesh, "ring")
    for name in STRATEGIES:
        shard_sequence({"input_ids": ids}, mesh, name)


def _joined(results: list[dict[str, Any]], name: str) -> list[list[int]]:
    assert len({tuple(result[name].shape) for result in results}) == 1, "every rank must get as many tokens"
    return torch.cat([result[name] for result in results], dim=1).tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_pads_shifts_and_cuts(ranks, world_size):
    ids = torch.arange(10, 17)[None].repeat(2, 1)
    mask = torch.ones_like(ids)
    results = ranks(world_size).run(cut, {"input_ids": ids, "labels": ids, "attention_mask": mask})
    padding = -7 % world_size
    assert _joined(results, "input_ids") == [[*range(10, 17), *[0] * padding]] * 2
    # The last token of a slice predicts the first of the next; the last one of all predicts nothing.
    assert _joined(results, "labels") == [[*range(11, 17), -100, *[-100] * padding]] * 2
    assert _joined(results, "shift_labels") == _joined(results, "labels")
    assert _joined(results, "attention_mask") == [[1] * 7 + [0] * padding] * 2
    assert _joined(results, "position_ids") == [[*range(7 + padding)]] * 2


def test_given_positions_go_on_through_the_padding(ranks):
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    results = ranks(3).run(cut, {"input_ids": torch.zeros(2, 5, dtype=torch.int64), "position_ids": positions})
    assert _joined(results, "position_ids") == [[0, 1, 2, 0, 1, 2]] * 2
    assert _joined(results, "counted_tokens") == [[1] * 5 + [0]] * 2
    assert results[0].keys() == {"input_ids", "position_ids", "counted_tokens", "sequence_cut"}


@pytest.mark.parametrize("ring", [1, 2, 4])
def test_under_tsp_all_ranks_are_one_ring(ranks, ring):
    """Eight blocks for four ranks: the i-th from the front and the i-th from the end, whatever the mesh."""
    ids = torch.arange(10, 23)[None]
    results = ranks(4).run(cut, {"input_ids": ids, "labels": ids}, "tsp", ring)
    assert [result["position_ids"][0].tolist() for result in results] == [
        [0, 1, 14, 15],
        [2, 3, 12, 13],
        [4, 5, 10, 11],
        [6, 7, 8, 9],
    ]
    assert results[0]["input_ids"].tolist() == [[10, 11, 0, 0]]
    assert results[1]["shift_labels"].tolist() == [[13, 14, -100, -100]]
    assert results[1]["counted_tokens"].tolist() == [[1, 1, 1, 0]]


def test_given_counts_are_cut_and_padded(ranks):
    """Padding behind packed documents, which no mask shows."""
    ids, counted = torch.arange(10, 17)[None], torch.tensor([[1, 1, 1, 0, 1, 1, 0]])
    mask = torch.ones_like(ids)
    for batch in ({}, {"attention_mask": mask}):
        results = ranks(2).run(cut, {"input_ids": ids, "counted_tokens": counted, **batch})
        assert _joined(results, "counted_tokens") == [[1, 1, 1, 0, 1, 1, 0, 0]]
    results = ranks(2).run(cut, {"input_ids": ids[:, 1:], "counted_tokens": counted[:, 1:]})
    assert _joined(results, "counted_tokens") == [[1, 1, 0, 1, 1, 0]]


def test_sequences_shorter_than_the_ranks(ranks):
    results = ranks(3).run(cut, {"input_ids": torch.tensor([[5]])})
    assert _joined(results, "input_ids") == [[5, 0, 0]]


def test_refusals(ranks):
    ranks(2).run(refusals)
