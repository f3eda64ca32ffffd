"""What descriptors of cut batches say, and what they refuse; helpers beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import odysseus_kernels as ody
from odysseus_kernels.attention import layout
from odysseus_kernels.nn.cut import KEY, RING_LAYOUT, SequenceCut, checksums, natural_order, part_positions
from odysseus_kernels.nn.loss import token_count


def test_descriptors_come_back():
    cut = SequenceCut(2, 3, True, 4, 23, 24)
    sums = torch.tensor([5, -7])
    again = SequenceCut.read(cut.tensor(sums))
    assert again == SequenceCut(2, 3, True, 4, 23, 24, sums=(5, -7))
    assert (again.slices, again.padding) == (3, 1)
    declared = SequenceCut(2, 3, False, 1, 24, 24, declared=True)
    assert SequenceCut.read(declared.tensor(sums[:1])).declared
    striped = SequenceCut(2, 2, True, 3, 23, 24, pieces=3)
    assert SequenceCut.read(striped.tensor(sums)).pieces == 3
    assert "striped in 3 pieces" in striped.describe() and "striped" not in cut.describe()
    assert RING_LAYOUT == "zigzag"


@pytest.mark.parametrize(
    "descriptor",
    [None, "cut", torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 9), torch.zeros(0, 9, dtype=torch.int64)],
)
def test_no_descriptors(descriptor):
    with pytest.raises(ValueError, match=r"expected what shard_sequence returned, int64 \[B, 9\], got"):
        SequenceCut.read(descriptor)
    with pytest.raises(ValueError, match="got the numbers"):
        SequenceCut.read(torch.zeros(1, 9, dtype=torch.int64))


def test_parts_cover_the_sequence_once():
    for ring, slices in ((1, 1), (1, 3), (2, 1), (2, 3), (3, 2)):
        parts = [part_positions(ring, slices, part, 24) for part in range(ring * slices)]
        assert torch.cat(parts).sort().values.tolist() == list(range(24)), (ring, slices)


def test_stripes_cover_each_piece_in_the_order_of_the_ranks():
    for ring, slices, pieces in ((1, 3, 2), (2, 2, 3), (1, 2, 12)):
        parts = [part_positions(ring, slices, part, 24, pieces) for part in range(ring * slices)]
        whole = natural_order(torch.cat(parts)[None], ring, slices, pieces)[0]
        assert torch.equal(whole, torch.cat([layout.positions(rank, ring, 24, RING_LAYOUT) for rank in range(ring)]))
        sizes = layout.piece_rows(24 // (ring * slices), pieces)
        for index, part in enumerate(parts):  # a rank has as many rows of a piece as every other one, side by side
            own = layout.positions(index // slices, ring, 24, RING_LAYOUT)
            stripes = torch.searchsorted(own, part).split(sizes)
            assert all((stripe.diff() == 1).all() for stripe in stripes)
            starts = [slices * sum(sizes[:piece]) + index % slices * size for piece, size in enumerate(sizes)]
            assert [stripe[0].item() for stripe in stripes] == starts
    # Features stay beside their tokens.
    parts = [part_positions(1, 2, part, 8, 2) for part in range(2)]
    assert natural_order(torch.cat(parts)[None, :, None].expand(1, 8, 3), 1, 2, 2)[0, :, 2].tolist() == list(range(8))


def test_checksums_tell_batches_apart():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, (3, 50), generator=generator)
    batch = {"input_ids": ids, "labels": ids}
    same = checksums({"labels": ids.int(), "input_ids": ids.clone()}, 3)
    assert torch.equal(checksums(batch, 3), same), "neither order nor integer type counts"
    assert torch.equal(checksums({name: t[1:] for name, t in batch.items()}, 2), same[1:]), "rows stand alone"
    others = [{"input_ids": ids}, {**batch, "attention_mask": torch.ones_like(ids)}, {"position_ids": ids, **batch}]
    for a, b in ((0, 1), (7, 30), (48, 49)):
        swapped, moved = ids.clone(), ids.clone()
        swapped[:, [a, b]] = ids[:, [b, a]]
        moved[:, a] += 1
        moved[:, b] -= 1
        others += [{**batch, "input_ids": swapped}, {**batch, "labels": moved}, {"input_ids": moved, "labels": moved}]
    others.append({"input_ids": ids[:, :49], "labels": ids[:, :49]})
    for other in others:
        assert (checksums(other, 3) != same).all()
    assert (checksums({"input_ids": torch.zeros(2, 4, dtype=torch.int64)}, 2) != 0).all()


def test_divisors_of_a_loss():
    for form in (7, 7.0, torch.tensor(7), torch.tensor([7]), torch.full((2, 1), 7.0)):
        assert token_count(form) == 7.0
    assert token_count(None) is None
    assert token_count(0) == 0.0
    for form in (True, "7", torch.tensor([True]), [7]):
        with pytest.raises(TypeError, match="expected a number of tokens"):
            token_count(form)
    for form in (-1, float("nan"), torch.tensor([1, 2]), torch.tensor([])):
        with pytest.raises(ValueError, match="num_items: expected"):
            token_count(form)


def refusals(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("seq",))
    ring = init_device_mesh("cpu", (world_size, 1), mesh_dim_names=("ring", "seq"))
    ids = torch.zeros(2, 6, dtype=torch.int64)

    def refused(match: str, call: Any, *args: Any, **settings: Any) -> None:
        with pytest.raises(ValueError, match=match):
            call(*args, **settings)

    refused("strategy: expected one of", ody.declare_cut, {"input_ids": ids}, mesh, "ring")
    refused("expected input_ids", ody.declare_cut, {"labels": ids}, mesh)
    refused("length: expected 1 to 12", ody.declare_cut, {"input_ids": ids}, mesh, length=13)
    refused("length: expected 1 to 6", ody.declare_cut, {"input_ids": ids}, mesh, "tp", length=0)
    refused("even number of tokens", ody.declare_cut, {"input_ids": ids[:, :5]}, ring)
    batch = ody.shard_sequence({"input_ids": ids, "labels": ids}, mesh)
    x = torch.zeros(2, 3, 4)
    refused("with sequence_cut", ody.gather_sequence, x, {"input_ids": ids}, mesh)
    refused(r"this rank's part \[2, 3, ...\], got \[2, 6, 4\]", ody.gather_sequence, torch.zeros(2, 6, 4), batch, mesh)
    refused("this batch was cut", ody.gather_sequence, x, batch, ring)
    refused("before shard_sequence", ody.num_items_in_batch, batch, mesh)
    refused("with labels", ody.num_items_in_batch, {"input_ids": ids}, mesh)
    other = {**batch, KEY: batch[KEY].clone()}
    other[KEY][:, 4] = 1 - rank
    refused(f"expected part {rank} of 2 on this rank, got part {1 - rank}", ody.gather_sequence, x, other, mesh)
    labels = torch.tensor([[1, -100, 3, 4], [-100, -100, -100, 2]])
    assert ody.num_items_in_batch({"labels": labels}, mesh) == 3.0
    assert ody.num_items_in_batch([{"labels": labels}, {"labels": labels[:1]}], mesh) == 5.0


def test_refusals(ranks):
    ranks(2).run(refusals)
