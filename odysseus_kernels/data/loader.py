"""Batches for causal language models on ranks that share sequences: the same on all of them, packed, resumable."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from odysseus_kernels.data.batches import packed_batch, padded_batch, similar_lengths
from odysseus_kernels.data.windows import Row, WindowSettings, generator_of, is_stream, windows_of
from odysseus_kernels.nn.group import DATA_DIMENSION, SequenceGroup
from odysseus_kernels.nn.sequence import shard_sequence
from odysseus_kernels.nn.step import sequence_group_of, stepped

__all__ = ["SequenceDataLoader"]

_Packing = Literal["best_fit", "none"]
_Long = Literal["split", "drop", "error"]


@dataclasses.dataclass(frozen=True)
class _Position:
    """What comes next: the batch after ``batches`` of those made of the rows from ``row`` of ``window`` on."""

    epoch: int = 0
    window: int = 0
    row: int = 0
    batches: int = 0


class SequenceDataLoader:
    """Loads tokenized documents for training on ranks that share sequences.

    Ranks that differ in ``"seq"`` or ``"ring"`` get parts of the same rows, ranks of ``"dp"`` rows of their own: of
    each global batch of ``batch_size`` x D rows, rank d of D has every D-th row from the d-th on.  All ranks read the
    same documents and decide alike; nothing is sent.  That ranks of a sequence had the same documents is checked by the
    model: it compares checksums of batches in its first calls, and a rank that differs is a ``RankMismatchError`` that
    names it.  Ranks of ``"dp"`` are not compared.

    **Rows.** With ``packing="best_fit"`` rows of ``length`` tokens hold several documents, which do not attend to one
    another: ``position_ids`` begin at 0 in each.  With ``"none"`` a row is one document, padded to the longest of its
    global batch, with an ``attention_mask``.  The first token of each document has the label -100: nothing predicts it.
    Documents without tokens are left out; longer ones than ``length`` are cut into documents of that length
    (``long="split"``, which loses the prediction of the first token of each), left out (``"drop"``) or refused
    (``"error"``).

    **Order.** It follows from ``seed`` and the epoch alone, and global batches of the same size are the same for any
    number of ranks of ``"dp"``.  An epoch that ends is followed by the next; :meth:`set_epoch` chooses one.  A stream
    (an iterable dataset) is shuffled within windows; its ``set_epoch`` is called where it has one.  Every rank must be
    given all of a stream, not a part of its own.

    **The last global batch** may have fewer rows than the others: ``drop_last`` leaves it out, else rows without labels
    fill it up.  All ranks yield equally many batches.  A rank that gets only such rows has a loss of nan, unless it is
    given ``num_items_in_batch``.

    Args:
        dataset: map-style or iterable, of ``{"input_ids": ..., "labels": ...}``: lists, arrays or tensors of n whole
            numbers.  Labels are not shifted, and are the tokens where there are none; other keys are not read.
        mesh: what :func:`shard_sequence` takes: the model's mesh, or the parallelized model.  None: whole batches of
            one process.
        length: tokens of a row.
        batch_size: rows of each rank of ``"dp"``.
        packing: see above.
        strategy: as for :func:`shard_sequence`.
        long: what becomes of documents longer than ``length``.
        window: documents that are read, shuffled (streams) and packed together, by every rank; the last row of each
            window alone has room for more.
        shuffle: False: in the order of the dataset.
        seed: of the order.
        drop_last: see above.
        round_to: rows are padded to a multiple of it.  Each new shape of a batch may need more shared memory, and on
            GPUs its modes are timed; few shapes do not.
        buckets: with ``"none"``, so many global batches in a row are sorted by the lengths of their documents, so that
            each has similar ones.
        pad_token: what padding consists of; any valid token.
        shard: False: whole batches, for :func:`num_items_in_batch` and :func:`shard_sequence` by the caller.
        num_workers: processes that read and pack windows ahead; at most 1 for streams, of which each would read all.
        multiprocessing_context: how they are started, as ``torch.utils.data.DataLoader`` takes it.

    Raises:
        ValueError: for arguments or documents that do not fit, or an epoch without a single batch.

    Example:
        >>> documents = [{"input_ids": list(range(1, n))} for n in (6, 13, 10, 21, 3, 9)]
        >>> loader = ody.SequenceDataLoader(documents, mesh, length=16, batch_size=2, shuffle=False)
        >>> [list(part["input_ids"].shape) for part in loader]  # on each of two ranks
        [[2, 8], [2, 8]]
        >>> whole = ody.SequenceDataLoader(documents, mesh, length=16, batch_size=2, shuffle=False, shard=False)
        >>> next(iter(whole))["position_ids"][0].tolist()  # documents of 5, 9 and 2 tokens
        [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1]
        >>> model = ody.parallelize(model, mesh)
        >>> for part in ody.SequenceDataLoader(documents, model, length=16, batch_size=2):
        ...     model(**part).loss.backward()
    """

    def __init__(
        self,
        dataset: Any,
        mesh: DeviceMesh | nn.Module | None,
        *,
        length: int,
        batch_size: int = 1,
        packing: _Packing = "best_fit",
        strategy: str | None = None,
        long: _Long = "split",
        window: int = 1024,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        round_to: int = 1,
        buckets: int = 1,
        pad_token: int = 0,
        shard: bool = True,
        num_workers: int = 0,
        multiprocessing_context: Any = None,
    ) -> None:
        for name, value, least in (
            ("length", length, 2),
            ("batch_size", batch_size, 1),
            ("window", window, 1),
            ("seed", seed, 0),
            ("round_to", round_to, 1),
            ("buckets", buckets, 1),
            ("pad_token", pad_token, 0),
            ("num_workers", num_workers, 0),
        ):
            _check_number(name, value, least)
        for name, given, choices in (("packing", packing, _Packing), ("long", long, _Long)):
            if given not in get_args(choices):
                raise ValueError(f"{name}: expected one of {get_args(choices)}, got {given!r}")
        if buckets > 1 and packing != "none":
            raise ValueError(
                f"buckets: expected 1 with packing={packing!r}, whose rows are equally long, got {buckets}"
            )
        stream = is_stream(dataset)
        if stream and num_workers > 1:
            raise ValueError(
                f"num_workers: expected 0 or 1 with an iterable dataset, of which each worker would read all, got "
                f"{num_workers}"
            )
        self._dataset, self._mesh, self._strategy = dataset, mesh, strategy
        self._settings = WindowSettings(length, packing, long, window, shuffle, seed)
        self._documents = None if stream else len(dataset)
        self._rank, self._ranks = _data_parallel(mesh)
        if packing == "best_fit" and batch_size > 1 and isinstance(mesh, nn.Module):
            _check_rows_of_documents(mesh, batch_size, length)
        self._global = batch_size * self._ranks
        self._drop_last, self._round_to, self._buckets = drop_last, round_to, buckets
        self._pad_token, self._shard = pad_token, shard and mesh is not None
        self._workers = (num_workers, multiprocessing_context)
        self._position = _Position()
        self._resumed = False

    @property
    def epoch(self) -> int:
        """The epoch that the next batch is of."""
        return self._position.epoch

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is of ``epoch``; where that is the epoch that was resumed, it goes on within it.

        Raises:
            ValueError: if it is no whole number from 0 on.
        """
        _check_number("epoch", epoch, 0)
        if epoch != self._position.epoch:
            self._position, self._resumed = _Position(epoch), False

    def state_dict(self) -> dict[str, Any]:
        """Where this loader is: numbers and strings, for ``save_checkpoint(..., extra={"data": ...})``.

        What workers have read ahead does not count, only batches that were yielded.
        """
        return {"position": dataclasses.asdict(self._position), "order": self._order()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Makes the next iteration go on behind the last batch that was yielded before ``state`` was taken.

        The number of ranks may be another one if the global batch is the same.  A stream is read again from its
        beginning, and what was had is left out.

        Raises:
            ValueError: for a state of another order: of other arguments, another global batch or number of documents.
        """
        if set(state) != {"position", "order"}:
            raise ValueError(f"state: expected what state_dict returned, got the keys {sorted(state)}")
        own, saved = self._order(), dict(state["order"])
        different = [name for name in own if own[name] != saved.get(name)]
        if different:
            expected = ", ".join(f"{name}={own[name]!r}" for name in different)
            got = ", ".join(f"{name}={saved.get(name)!r}" for name in different)
            raise ValueError(f"state: expected one of a loader with {expected}, got one with {got}")
        fields = [field.name for field in dataclasses.fields(_Position)]
        position = dict(state["position"])
        if set(position) != set(fields):
            raise ValueError(f"state: expected a position with {fields}, got {sorted(position)}")
        for name in fields:
            _check_number(name, position[name], 0)
        self._position, self._resumed = _Position(**position), True

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The batches of the epoch, or what is left of it after :meth:`load_state_dict`."""
        if not self._resumed:
            self._position = _Position(self._position.epoch)
        self._resumed = False
        return self._batches(self._position)

    def _order(self) -> dict[str, Any]:
        """What the order of documents, rows and batches follows from."""
        settings = dataclasses.asdict(self._settings)
        settings["window"] = settings.pop("documents")
        return {**settings, "global_batch": self._global, "buckets": self._buckets, "documents": self._documents}

    def _batches(self, start: _Position) -> Iterator[dict[str, Tensor]]:
        if hasattr(self._dataset, "set_epoch"):
            self._dataset.set_epoch(start.epoch)
        rows: list[Row] = []
        number, at = 0, start
        for row, following in self._rows(start):
            rows.append(row)
            if len(rows) == self._global * self._buckets:
                for batch in self._chunk(rows, at, following):
                    number += 1
                    yield batch
                rows, at = [], following
        over = _Position(start.epoch + 1)
        for batch in self._chunk(rows, at, over):
            number += 1
            yield batch
        if number == 0 and start == _Position(start.epoch):
            raise ValueError(
                f"dataset: expected a global batch of {self._global} rows in epoch {start.epoch}, got {len(rows)} rows "
                f"with drop_last={self._drop_last}"
            )
        self._position = over

    def _rows(self, start: _Position) -> Iterator[tuple[Row, _Position]]:
        """Rows from ``start`` on, each with the position behind it."""
        windows = windows_of(self._dataset, self._settings, start.epoch, start.window, *self._workers)
        for window, found in enumerate(windows, start.window):
            for index, row in enumerate(found.rows()):
                if window > start.window or index >= start.row:
                    yield row, _Position(start.epoch, window, index + 1)

    def _chunk(self, rows: list[Row], at: _Position, following: _Position) -> Iterator[dict[str, Tensor]]:
        """The batches of ``rows``, which begin at ``at``; what was yielded is noted before it is."""
        if self._drop_last:
            rows = rows[: len(rows) // self._global * self._global]
        generator = None
        if self._settings.shuffle:
            generator = generator_of(self._settings.seed, at.epoch, at.window, at.row, "batches")
        batches = [rows] if rows else []
        if self._buckets > 1:
            batches = similar_lengths(rows, self._global, generator)
        for index in range(at.batches, len(batches)):
            last = index + 1 == len(batches)
            self._position = following if last else dataclasses.replace(at, batches=index + 1)
            yield self._own(batches[index])

    def _own(self, rows: list[Row]) -> dict[str, Tensor]:
        """This rank's part of a global batch."""
        full: list[Row | None] = [*rows, *[None] * (self._global - len(rows))]
        own = full[self._rank :: self._ranks]
        packed = self._settings.packing == "best_fit"
        longest = self._settings.length if packed else max(row.tokens.numel() for row in rows)
        width = -(-longest // self._round_to) * self._round_to
        batch = (packed_batch if packed else padded_batch)(own, width, self._pad_token)
        if not self._shard or self._mesh is None:
            return batch
        return shard_sequence(batch, self._mesh, self._strategy)


def _data_parallel(mesh: DeviceMesh | nn.Module | None) -> tuple[int, int]:
    """(this rank, number of ranks) along ``"dp"``."""
    if mesh is None:
        return 0, 1
    group = sequence_group_of(mesh) if isinstance(mesh, nn.Module) else SequenceGroup.of(mesh)
    if DATA_DIMENSION not in (group.whole.mesh_dim_names or ()):
        return 0, 1
    return group.whole.get_local_rank(DATA_DIMENSION), group.whole[DATA_DIMENSION].size()


def _check_rows_of_documents(model: nn.Module, batch_size: int, length: int) -> None:
    """Refuses several packed rows where the attention function finds documents in a single one only."""
    inner: Any = stepped(model)
    if (
        getattr(getattr(inner, "config", None), "_attn_implementation", None) == "flash_attention_2"
        and inner.sequence_group.zigzag_size == 1
        and inner.pieces_for(length) == 1
    ):
        raise ValueError(
            f"batch_size: expected 1 with packing='best_fit' and flash_attention_2, which is told of documents in "
            f"single rows only, got {batch_size}: make rows longer instead, use sdpa, or a mesh with 'ring'"
        )


def _check_number(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected a whole number from {least} on, got {value!r}")
