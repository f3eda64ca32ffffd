"""The order and content of batches, whole, on one or several data-parallel ranks."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset

from odysseus_kernels.data import loader as loader_module
from odysseus_kernels.data.loader import SequenceDataLoader

pytestmark = pytest.mark.without_ranks

Batches = list[dict[str, torch.Tensor]]


def documents_of(lengths: list[int]) -> list[dict[str, list[int]]]:
    """Documents whose tokens are all different, from 1 on."""
    numbers = itertools.count(1)
    return [{"input_ids": [next(numbers) for _ in range(length)]} for length in lengths]


def random_documents(number: int, longest: int = 20, seed: int = 0) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    return documents_of(torch.randint(1, longest + 1, (number,), generator=generator).tolist())


class Stream(IterableDataset[Any]):
    """The same documents one after another."""

    def __init__(self, documents: list[Any]) -> None:
        self.documents, self.epochs = documents, list[int]()

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.documents)


@pytest.fixture
def on_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[..., SequenceDataLoader]:
    """A loader as rank ``rank`` of ``ranks`` data-parallel ones makes it."""

    def make(dataset: Any, rank: int, ranks: int, **arguments: Any) -> SequenceDataLoader:
        monkeypatch.setattr(loader_module, "_data_parallel", lambda mesh: (rank, ranks))
        return SequenceDataLoader(dataset, None, **arguments)

    return make


def joined(parts: list[Batches]) -> Batches:
    """Global batches, from those of all data-parallel ranks."""
    assert len({len(part) for part in parts}) == 1, "all ranks must yield equally many batches"
    return [
        {name: torch.stack([b[name] for b in same], dim=1).flatten(0, 1) for name in ("input_ids", "labels")}
        for same in zip(*parts, strict=True)
    ]


def equal(first: Batches, second: Batches) -> bool:
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(first, second, strict=True)
    )


def pieces_of(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    """The documents in the rows of a packed batch, padding left out, by their positions."""
    found = []
    for tokens, positions in zip(batch["input_ids"].tolist(), batch["position_ids"].tolist(), strict=True):
        starts = [place for place, position in enumerate(positions) if position == 0]
        found += [tokens[a:b] for a, b in itertools.pairwise([*starts, len(tokens)])]
    return [piece for piece in found if piece[0] != 0]


@given(
    lengths=st.lists(st.integers(0, 25), min_size=1, max_size=40),
    length=st.integers(2, 12),
    window=st.integers(1, 50),
    shuffle=st.booleans(),
)
@settings(deadline=None)
def test_packed_rows_have_every_token_once(lengths: list[int], length: int, window: int, shuffle: bool) -> None:
    documents = documents_of([1, *lengths])
    batches = list(SequenceDataLoader(documents, None, length=length, batch_size=2, window=window, shuffle=shuffle))
    pieces = sorted(piece for batch in batches for piece in pieces_of(batch))
    # Longer documents are cut; of each piece all tokens follow one another.
    expected = [d["input_ids"][i : i + length] for d in documents for i in range(0, len(d["input_ids"]), length)]
    assert pieces == expected
    for batch in batches:
        assert batch["input_ids"].shape == (2, length)
        begins, real = batch["position_ids"] == 0, batch["input_ids"] != 0
        assert torch.equal(batch["labels"], torch.where(real & ~begins, batch["input_ids"], -100))
        counted = batch.get("counted_tokens", torch.ones_like(batch["labels"]))
        assert torch.equal(counted.bool(), real)
        steps = batch["position_ids"].diff(dim=1)
        assert bool(((steps == 1) | begins[:, 1:]).all())


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=40), buckets=st.integers(1, 4), round_to=st.integers(1, 5)
)
@settings(deadline=None)
def test_padded_rows_have_every_token_once(lengths: list[int], buckets: int, round_to: int) -> None:
    documents = documents_of(lengths)
    loader = SequenceDataLoader(
        documents, None, length=12, batch_size=3, packing="none", buckets=buckets, round_to=round_to, window=7
    )
    found = []
    for batch in loader:
        width = batch["input_ids"].shape[1]
        real = batch["attention_mask"].bool() & batch.get("counted_tokens", torch.ones_like(batch["labels"])).bool()
        longest = int(real.sum(1).max())
        assert width == -(-longest // round_to) * round_to
        assert bool((batch["labels"][:, 1:] == batch["input_ids"][:, 1:].where(real[:, 1:], -100)).all())
        assert bool((batch["attention_mask"].sum(1) > 0).all()), "a row that sees nothing is nan"
        found += [row[mask].tolist() for row, mask in zip(batch["input_ids"], real, strict=True) if bool(mask.any())]
    assert sorted(found) == [document["input_ids"] for document in documents]


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_long_documents(packing: Any) -> None:
    documents = documents_of([3, 10, 4])
    common = {"length": 4, "packing": packing, "shuffle": False}
    split = list(SequenceDataLoader(documents, None, **common))
    assert sum(int((batch["labels"] != -100).sum()) for batch in split) == 17 - 5  # five pieces lose their first
    dropped = list(SequenceDataLoader(documents, None, long="drop", **common))
    assert sorted(t for b in dropped for t in b["input_ids"].flatten().tolist() if t) == [1, 2, 3, 14, 15, 16, 17]
    with pytest.raises(ValueError, match=r"at most length=4 tokens, got 10 in document 1; long=\"split\" cuts"):
        list(SequenceDataLoader(documents, None, long="error", **common))


def test_labels_and_types_of_documents() -> None:
    documents = [
        {"input_ids": np.array([5, 6, 7]), "labels": [-100, -100, 7], "attention_mask": [1, 1, 1], "text": "…"},
        {"input_ids": torch.tensor([8, 9], dtype=torch.int32)},
        {"input_ids": []},
    ]
    (batch,) = SequenceDataLoader(documents, None, length=6, shuffle=False)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, -100, 9, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch["counted_tokens"].tolist() == [[1, 1, 1, 1, 1, 0]]
    # The dataset's own tensors are left alone.
    tokens = torch.tensor([1, 2, 3])
    list(SequenceDataLoader([{"input_ids": tokens, "labels": tokens}], None, length=4))
    assert tokens.tolist() == [1, 2, 3]


ARGUMENTS: list[dict[str, Any]] = [
    {"packing": "best_fit"},
    {"packing": "best_fit", "shuffle": False},
    {"packing": "none", "round_to": 4},
    {"packing": "none", "buckets": 3},
    {"packing": "none", "buckets": 3, "shuffle": False, "drop_last": True},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("make", [list, Stream])
def test_global_batches_do_not_depend_on_the_ranks(
    on_rank: Callable[..., SequenceDataLoader], arguments: dict[str, Any], make: Any
) -> None:
    dataset = make(random_documents(101))
    whole = list(on_rank(dataset, 0, 1, length=24, batch_size=4, window=30, **arguments))
    for ranks in (2, 4):
        common = {"length": 24, "batch_size": 4 // ranks, "window": 30, **arguments}
        parts = [list(on_rank(dataset, rank, ranks, **common)) for rank in range(ranks)]
        assert equal(joined(parts), [{name: b[name] for name in ("input_ids", "labels")} for b in whole])


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("make", [list, Stream])
def test_resumes_at_the_next_batch(
    on_rank: Callable[..., SequenceDataLoader], arguments: dict[str, Any], make: Any
) -> None:
    """Behind every batch of an epoch, on another number of ranks, from what JSON keeps."""
    dataset = make(random_documents(60))
    common = {"length": 24, "window": 17, **arguments}
    first = on_rank(dataset, 0, 1, batch_size=4, **common)
    first.set_epoch(3)
    states = [first.state_dict()]
    whole = []
    for batch in first:
        whole.append({name: batch[name] for name in ("input_ids", "labels")})
        states.append(json.loads(json.dumps(first.state_dict())))
    assert len(whole) > 4
    for done, state in enumerate(states):
        parts = []
        for rank in range(2):
            again = on_rank(dataset, rank, 2, batch_size=2, **common)
            again.load_state_dict(state)
            again.set_epoch(again.epoch)  # as a loop over epochs does
            rest = list(again) if again.epoch == 3 else []
            assert done < len(whole) or not rest
            parts.append(rest)
            assert again.epoch == 4
            following = [batch["input_ids"] for batch in again]
            assert not torch.equal(following[0], whole[0]["input_ids"]) or not arguments.get("shuffle", True)
        assert equal(joined(parts), whole[done:])


def test_epochs() -> None:
    documents = random_documents(40)
    loader = SequenceDataLoader(documents, None, length=24, batch_size=2)
    epochs = [list(loader) for _ in range(2)]
    assert loader.epoch == 2
    assert not equal(*epochs)
    loader.set_epoch(1)
    assert equal(list(loader), epochs[1])
    assert not equal(list(SequenceDataLoader(documents, None, length=24, batch_size=2, seed=1)), epochs[0])
    # An iteration that is left is begun again; its state is that of the latest.
    loader.set_epoch(0)
    next(iter(loader))
    assert equal(list(loader), epochs[0])
    stream = Stream(documents)
    streaming = SequenceDataLoader(stream, None, length=24, batch_size=2)
    for _ in range(2):
        list(streaming)
    assert stream.epochs == [0, 1]


@pytest.mark.parametrize("arguments", ARGUMENTS[:4:2], ids=str)
def test_workers_read_ahead_and_change_nothing(arguments: dict[str, Any]) -> None:
    documents = random_documents(120)
    common = {"length": 24, "batch_size": 2, "window": 16, **arguments}
    expected = list(SequenceDataLoader(documents, None, **common))
    before = torch.get_rng_state()
    for dataset, workers in ((documents, 1), (documents, 2), (Stream(documents), 1)):
        alone = expected if dataset is documents else list(SequenceDataLoader(dataset, None, **common))
        loader = SequenceDataLoader(dataset, None, num_workers=workers, **common)
        batches = iter(loader)
        some = [next(batches) for _ in range(3)]
        state = loader.state_dict()  # workers are further
        assert equal([*some, *batches], alone)
        again = SequenceDataLoader(dataset, None, num_workers=workers, **common)
        again.load_state_dict(state)
        assert equal(list(again), alone[3:])
    assert torch.equal(torch.get_rng_state(), before), "the generator that dropout draws from is left alone"


class Broken(Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return {"input_ids": [1] * 3, "labels": [1] * (2 if index == 5 else 3)}


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_worker_is_the_users(workers: int) -> None:
    with pytest.raises(ValueError, match="expected as many labels as input_ids, got 2 and 3 in document 5"):
        list(SequenceDataLoader(Broken(), None, length=4, num_workers=workers))


def test_documents_are_fetched_together_where_the_dataset_can() -> None:
    asked = []

    class Fetching(list):  # type: ignore[type-arg]
        def __getitems__(self, indices: list[int]) -> list[Any]:
            asked.append(len(indices))
            return [self[index] for index in indices]

    dataset = Fetching(random_documents(20))
    assert equal(
        list(SequenceDataLoader(dataset, None, length=24, window=8)),
        list(SequenceDataLoader(list(dataset), None, length=24, window=8)),
    )
    assert asked == [8, 8, 4]


@pytest.mark.parametrize("workers", [0, 1])
def test_hugging_face_datasets(workers: int) -> None:
    datasets = pytest.importorskip("datasets")
    documents = random_documents(40)
    dataset = datasets.Dataset.from_list(documents)
    common = {"length": 24, "batch_size": 2, "window": 16, "num_workers": workers}
    for theirs, same in ((dataset, documents), (dataset.to_iterable_dataset(), Stream(documents))):
        loader, other = (SequenceDataLoader(one, None, **common) for one in (theirs, same))
        assert all(equal(list(loader), list(other)) for _ in range(2))


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_the_last_global_batch(on_rank: Callable[..., SequenceDataLoader], packing: Any) -> None:
    documents = documents_of([4] * 9)
    common = {"length": 4, "batch_size": 2, "packing": packing, "shuffle": False}
    parts = [list(on_rank(documents, rank, 2, **common)) for rank in range(2)]
    # One document is left for four rows: the first rank has it.
    assert [[int((b["labels"] != -100).sum()) for b in part] for part in parts] == [[6, 6, 3], [6, 6, 0]]
    for part in parts:
        assert [batch["input_ids"].shape for batch in part] == [(2, 4)] * 3
    assert parts[0][-1]["counted_tokens"].tolist() == [[1] * 4, [0] * 4]
    assert [len(list(on_rank(documents, rank, 2, drop_last=True, **common))) for rank in range(2)] == [2, 2]


def test_buckets_save_padding() -> None:
    documents = random_documents(400, longest=100)

    def padding(buckets: int) -> float:
        batches = SequenceDataLoader(documents, None, length=100, batch_size=4, packing="none", buckets=buckets)
        masks = [batch["attention_mask"] for batch in batches]
        return 1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)

    assert padding(1) > 0.3
    assert padding(25) < 0.05


def test_refusals() -> None:
    documents = random_documents(4)
    for arguments, match in (
        ({"length": 1}, "length: expected a whole number from 2 on, got 1"),
        ({"length": 8.0}, "length: expected a whole number from 2 on, got 8.0"),
        ({"batch_size": 0}, "batch_size: expected a whole number from 1 on, got 0"),
        ({"batch_size": True}, "batch_size: expected a whole number"),
        ({"window": 0}, "window: expected"),
        ({"round_to": 0}, "round_to: expected"),
        ({"num_workers": -1}, "num_workers: expected"),
        ({"packing": "first_fit"}, r"packing: expected one of \('best_fit', 'none'\), got 'first_fit'"),
        ({"long": "cut"}, r"long: expected one of \('split', 'drop', 'error'\), got 'cut'"),
        ({"buckets": 2}, "buckets: expected 1 with packing='best_fit'"),
        ({"dataset": 3}, "dataset: expected one with __getitem__ and __len__, or an iterable one, got int"),
        ({"dataset": Stream(documents), "num_workers": 2}, "num_workers: expected 0 or 1 with an iterable dataset"),
    ):
        with pytest.raises(ValueError, match=match):
            SequenceDataLoader(**{"dataset": documents, "mesh": None, "length": 8, **arguments})
    for document, match in (
        ([1, 2], "expected documents .* got list as document 0"),
        ({"ids": [1]}, r"got the keys \['ids'\] as document 0"),
        ({"input_ids": [0.5]}, "expected whole numbers in document 0, input_ids, got torch.float32"),
        ({"input_ids": "text"}, "expected whole numbers in document 0, input_ids, got str"),
        ({"input_ids": [[1]]}, r"expected one dimension in document 0, input_ids, got shape \[1, 1\]"),
        ({"input_ids": [1, 0], "attention_mask": [1, 0]}, "documents without padding, got zeros in the attention_mask"),
    ):
        with pytest.raises(ValueError, match=match):
            list(SequenceDataLoader([document], None, length=8))
    with pytest.raises(
        ValueError, match="expected a global batch of 9 rows in epoch 0, got 4 rows with drop_last=True"
    ):
        list(SequenceDataLoader(documents, None, length=20, batch_size=9, packing="none", drop_last=True))
    used_up = iter(documents)
    loader = SequenceDataLoader(used_up, None, length=20)
    assert list(loader)
    with pytest.raises(ValueError, match="in epoch 1, got 0 rows"):
        list(loader)


def test_states_of_other_loaders_are_refused() -> None:
    documents = random_documents(10)
    loader = SequenceDataLoader(documents, None, length=24, batch_size=4)
    state = loader.state_dict()
    with pytest.raises(ValueError, match="expected one of a loader with global_batch=2, got one with global_batch=4"):
        SequenceDataLoader(documents, None, length=24, batch_size=2).load_state_dict(state)
    with pytest.raises(ValueError, match="with length=20, documents=9, got one with length=24, documents=10"):
        SequenceDataLoader(documents[1:], None, length=20, batch_size=4).load_state_dict(state)
    with pytest.raises(ValueError, match=r"expected what state_dict returned, got the keys \['step'\]"):
        loader.load_state_dict({"step": 3})
    with pytest.raises(ValueError, match="expected a position with"):
        loader.load_state_dict({**state, "position": {"epoch": 1}})
    with pytest.raises(ValueError, match="row: expected a whole number from 0 on, got -1"):
        loader.load_state_dict({**state, "position": {**state["position"], "row": -1}})
    with pytest.raises(ValueError, match="epoch: expected a whole number from 0 on, got -1"):
        loader.set_epoch(-1)
