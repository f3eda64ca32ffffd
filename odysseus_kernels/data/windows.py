"""Documents as they are read, a window of them at a time, and the rows that each window is packed into.

Windows do not depend on one another, so that workers can make them side by side and a resumed run begins with any of
them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from odysseus_kernels.data.packing import best_fit
from odysseus_kernels.nn.loss import IGNORE_INDEX

__all__ = ["Row", "Window", "WindowSettings", "generator_of", "is_stream", "windows_of"]

# A window of a map-style dataset as workers are asked for it: its number, and the documents in it.
_Key = tuple[int, list[int]]


@dataclasses.dataclass(frozen=True)
class WindowSettings:
    """How documents become rows; arguments of :class:`~odysseus_kernels.data.loader.SequenceDataLoader`."""

    length: int
    packing: Literal["best_fit", "none"]
    long: Literal["split", "drop", "error"]
    documents: int
    shuffle: bool
    seed: int


@dataclasses.dataclass(frozen=True)
class Row:
    """One or several documents, one behind the other.

    Attributes:
        tokens: int64 [n].
        labels: int64 [n], not shifted; ``IGNORE_INDEX`` at the first token of each document.
        documents: number of tokens of each.
    """

    tokens: Tensor
    labels: Tensor
    documents: list[int]


@dataclasses.dataclass(frozen=True)
class Window:
    """The rows of a window, as few tensors: a worker sends each through a file descriptor of its own.

    Attributes:
        tokens, labels: int64 [n], of all rows one behind the other.
        documents: int64 [d], tokens of each document.
        counts: int64 [r], documents in each row.
    """

    tokens: Tensor
    labels: Tensor
    documents: Tensor
    counts: Tensor

    def rows(self) -> Iterator[Row]:
        """The rows one by one; they share memory with the window."""
        token = document = 0
        documents = self.documents.tolist()
        for count in self.counts.tolist():
            own = documents[document : document + count]
            end = token + sum(own)
            yield Row(self.tokens[token:end], self.labels[token:end], own)
            token, document = end, document + count


def generator_of(*what: object) -> torch.Generator:
    """A generator that is the same wherever it is made of the same numbers and names."""
    digest = hashlib.blake2b(repr(what).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def is_stream(dataset: Any) -> bool:
    """Whether documents come in the dataset's own order; ValueError if they cannot be read at all."""
    if not isinstance(dataset, IterableDataset) and hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        return False
    if not hasattr(dataset, "__iter__"):
        raise ValueError(
            f"dataset: expected one with __getitem__ and __len__, or an iterable one, got {type(dataset).__name__}"
        )
    return True


def windows_of(
    dataset: Any, settings: WindowSettings, epoch: int, first: int, num_workers: int, context: Any
) -> Iterator[Window]:
    """The windows of an epoch from number ``first`` on, read by ``num_workers`` processes ahead of their use."""
    source: Dataset[Window]
    if is_stream(dataset):
        source, sampler = _StreamWindows(dataset, settings, epoch, first), None
    else:
        source, sampler = _MapWindows(dataset, settings, epoch), _Keys(len(dataset), settings, epoch, first)
    return iter(
        DataLoader(
            source,
            sampler=sampler,
            batch_size=None,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            multiprocessing_context=context if num_workers else None,
            # Of its own: seeding workers would draw from the generator that ranks drop out with.
            generator=generator_of(settings.seed, epoch, "workers"),
        )
    )


def _as_it_is(window: Any) -> Any:
    return window


class _Keys:
    """The windows of an epoch of a map-style dataset: an order of all documents, cut into pieces."""

    def __init__(self, number: int, settings: WindowSettings, epoch: int, first: int) -> None:
        self._number, self._settings, self._epoch, self._first = number, settings, epoch, first

    def __iter__(self) -> Iterator[_Key]:
        number, size = self._number, self._settings.documents
        order = torch.arange(number)
        if self._settings.shuffle:
            order = torch.randperm(number, generator=generator_of(self._settings.seed, self._epoch, "documents"))
        for window in range(self._first, -(-number // size)):
            yield window, order[window * size : (window + 1) * size].tolist()


class _MapWindows(Dataset[Window]):
    """Packed windows of a map-style dataset."""

    def __init__(self, dataset: Any, settings: WindowSettings, epoch: int) -> None:
        self._dataset, self._settings, self._epoch = dataset, settings, epoch

    def __getitem__(self, key: Any) -> Window:
        window, indices = key
        fetch: Callable[[list[int]], Sequence[Any]] | None = getattr(self._dataset, "__getitems__", None)
        documents = [self._dataset[index] for index in indices] if fetch is None else fetch(indices)
        named = ((f"document {index}", document) for index, document in zip(indices, documents, strict=True))
        return _packed(named, self._settings, (self._epoch, window))


class _StreamWindows(IterableDataset[Window]):
    """Packed windows of documents in the order in which a dataset gives them."""

    def __init__(self, dataset: Iterable[Any], settings: WindowSettings, epoch: int, first: int) -> None:
        self._dataset, self._settings, self._epoch, self._first = dataset, settings, epoch, first

    def __iter__(self) -> Iterator[Window]:
        size = self._settings.documents
        stream = itertools.islice(enumerate(self._dataset), self._first * size, None)
        for window in itertools.count(self._first):
            documents = list(itertools.islice(stream, size))
            if not documents:
                return
            if self._settings.shuffle:
                order = torch.randperm(len(documents), generator=generator_of(self._settings.seed, self._epoch, window))
                documents = [documents[place] for place in order.tolist()]
            named = ((f"document {index}", document) for index, document in documents)
            yield _packed(named, self._settings, (self._epoch, window))


def _packed(documents: Iterable[tuple[str, Any]], settings: WindowSettings, which: tuple[int, int]) -> Window:
    """Rows of the documents of window ``which``, of which each has a name for errors."""
    tokens: list[Tensor] = []
    labels: list[Tensor] = []
    for name, document in documents:
        for ids, targets in _pieces(name, document, settings):
            tokens.append(ids)
            # Nothing is predicted from the document before.  A copy: the dataset may give the same tensor again.
            labels.append(torch.cat((targets.new_full((1,), IGNORE_INDEX), targets[1:])))
    lengths = [ids.numel() for ids in tokens]
    if settings.packing == "best_fit":
        rows = sorted(best_fit(lengths, settings.length))
    else:
        rows = [[piece] for piece in range(len(lengths))]
    if settings.shuffle and settings.packing == "best_fit":
        # Packing begins with the longest documents; rows must not.
        order = torch.randperm(len(rows), generator=generator_of(settings.seed, *which, "rows"))
        rows = [rows[place] for place in order.tolist()]
    flat = [piece for row in rows for piece in row]
    nothing = torch.zeros(0, dtype=torch.int64)
    return Window(
        torch.cat([nothing, *(tokens[piece] for piece in flat)]),
        torch.cat([nothing, *(labels[piece] for piece in flat)]),
        torch.tensor([lengths[piece] for piece in flat], dtype=torch.int64),
        torch.tensor([len(row) for row in rows], dtype=torch.int64),
    )


def _pieces(name: str, document: Any, settings: WindowSettings) -> list[tuple[Tensor, Tensor]]:
    """Tokens and labels of what is kept of a document, at most ``length`` of them in each piece."""
    if not isinstance(document, Mapping) or "input_ids" not in document:
        got = f"the keys {sorted(document)}" if isinstance(document, Mapping) else type(document).__name__
        raise ValueError(f'dataset: expected documents {{"input_ids": ...}}, got {got} as {name}')
    tokens = _integers(f"{name}, input_ids", document["input_ids"])
    labels = _integers(f"{name}, labels", document["labels"]) if document.get("labels") is not None else tokens
    if labels.shape != tokens.shape:
        raise ValueError(
            f"dataset: expected as many labels as input_ids, got {labels.numel()} and {tokens.numel()} in {name}"
        )
    mask = document.get("attention_mask")
    if mask is not None and not bool(_integers(f"{name}, attention_mask", mask).all()):
        raise ValueError(f"dataset: expected documents without padding, got zeros in the attention_mask of {name}")
    if tokens.numel() > settings.length:
        if settings.long == "error":
            raise ValueError(
                f"dataset: expected documents of at most length={settings.length} tokens, got {tokens.numel()} in "
                f'{name}; long="split" cuts such documents, long="drop" leaves them out'
            )
        if settings.long == "drop":
            return []
    if tokens.numel() == 0:
        return []
    return list(zip(tokens.split(settings.length), labels.split(settings.length), strict=True))


def _integers(name: str, values: Any) -> Tensor:
    """int64 [n] of a list, an array or a tensor."""
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"dataset: expected whole numbers in {name}, got {type(values).__name__}: {error}") from None
    if tensor.ndim != 1:
        raise ValueError(f"dataset: expected one dimension in {name}, got shape {list(tensor.shape)}")
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex()):
        raise ValueError(f"dataset: expected whole numbers in {name}, got {tensor.dtype}")
    return tensor.to(torch.int64)
