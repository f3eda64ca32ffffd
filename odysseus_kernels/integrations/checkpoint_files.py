"""A checkpoint's folder: torch.distributed.checkpoint's files, and a description of them as JSON.

Data is written by torch.distributed.checkpoint (DCP), each part once, into ``<folder>.unfinished``; the first rank
writes the description last and then gives the folder its name, so that a folder of that name is complete. DCP's own
``.metadata`` is written as well, for PyTorch's tools, but never read here: it is a pickle, which DCP's reader would
execute. What this module reads is JSON, and tensors through ``torch.load(weights_only=True)``.

All ranks of a model's mesh see the same file system and save together. While saving, they agree through DCP's
collectives; reading sends nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

__all__ = ["Description", "read_description", "read_tensors", "write"]

_DESCRIPTION = "checkpoint.json"
_OF_A_CHECKPOINT = re.compile(r"checkpoint\.json|\.metadata(\.tmp)?|__\d+_\d+\.distcp(\.tmp)?|\.nfs\w+")
_VERSION = 1
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


class Description:
    """What a checkpoint holds, known before any tensor is read.

    Attributes:
        contents: what the writer wants to get back.
        tensors: for each name, dtype and full shape.
    """

    def __init__(self, folder: Path, document: Mapping[str, Any]) -> None:
        self.folder = folder
        files = {chunk[2] for entry in document["tensors"].values() for chunk in entry["chunks"]}
        outside = [file for file in files if Path(file).name != file]
        if outside:
            raise ValueError(f"{folder}: expected names of files within the folder, got {outside[0]!r}")
        self.contents: dict[str, Any] = document["contents"]
        self._tensors: dict[str, dict[str, Any]] = document["tensors"]
        self.tensors = {
            name: (_DTYPES[entry["dtype"]], torch.Size(entry["shape"])) for name, entry in self._tensors.items()
        }

    def metadata(self) -> Metadata:
        """The same, as DCP's planner and reader want it."""
        state: dict[str, Any] = {}
        storage: dict[MetadataIndex, _StorageInfo] = {}
        for name, entry in self._tensors.items():
            chunks = []
            for offsets, sizes, file, start, length in entry["chunks"]:
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                storage[MetadataIndex(name, offsets)] = _StorageInfo(file, start, length)
            dtype, shape = self.tensors[name]
            state[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), shape, chunks)
        return Metadata(state, storage_data=storage)


def write(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    contents: Mapping[str, Any],
    group: dist.ProcessGroup | None = None,
) -> None:
    """Writes tensors (of DTensors, every rank its part) and ``contents``; every rank of ``group`` calls it.

    Raises:
        ValueError: ``folder`` exists and is not a checkpoint, or holds other things as well; nothing is touched.
        RuntimeError: on every rank, if one could not write; a checkpoint that was there before is kept.
    """
    for path, complete in _made_by_write(folder):
        _check_replaceable(path, complete=complete)
    alone = not dist.is_initialized()
    with _plain_errors(f"could not save {folder}"):
        # Plain tensors are the same on every rank: DCP writes one of them.
        dcp.save(
            dict(tensors),
            storage_writer=_Writer(folder, contents),
            planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
            no_dist=alone,
        )


def read_description(folder: Path) -> Description:
    """The description of a complete checkpoint.

    Raises:
        ValueError: if ``folder`` is not one.
    """
    path = folder / _DESCRIPTION
    if not path.is_file():
        beside = _beside(folder, "unfinished")
        why = f"; {beside} was interrupted while it was written" if beside.exists() else ""
        raise ValueError(f"folder: expected a checkpoint of save_checkpoint, but {path} does not exist{why}")
    try:
        document = json.loads(path.read_text())
        version = document["version"]
        if version == _VERSION:
            return Description(folder, document)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected the description of a checkpoint, got {error!r}") from None
    raise ValueError(f"{path}: expected version {_VERSION}, got {version!r}")


def read_tensors(description: Description, tensors: dict[str, torch.Tensor]) -> None:
    """Fills tensors in place, of DTensors this rank's part.  Names, shapes and dtypes are those of the description.

    Raises:
        RuntimeError: if a file cannot be read; tensors read before it are filled.
    """
    if not tensors:
        return
    with _plain_errors(f"could not load {description.folder}"):
        # Every rank reads for itself: nothing is sent, and ranks need not read at the same time.
        dcp.load(
            dict(tensors),
            storage_reader=_Reader(description),
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=True,
        )


def _made_by_write(folder: Path) -> list[tuple[Path, bool]]:
    """Paths that a save removes or replaces where they exist, and whether each is a complete checkpoint."""
    return [(folder, True), (_beside(folder, "replaced"), True), (_beside(folder, "unfinished"), False)]


def _check_replaceable(path: Path, *, complete: bool) -> None:
    """Raises ValueError unless ``path`` is absent, or a folder with the files of a checkpoint and nothing else."""
    if not path.exists() and not path.is_symlink():
        return
    expected = "expected no such path, or a checkpoint of save_checkpoint, which would be replaced"
    if path.is_symlink() or not path.is_dir():
        raise ValueError(f"{path}: {expected}, got a {'link' if path.is_symlink() else 'file'}; nothing was touched")
    names = sorted(entry.name for entry in path.iterdir())
    others = [name for name in names if not _OF_A_CHECKPOINT.fullmatch(name)]
    if others or (complete and _DESCRIPTION not in names):
        held = f"with {', '.join(others[:3])}{' and more' if len(others) > 3 else ''}" if others else "without one"
        raise ValueError(f"{path}: {expected}, got a folder {held}; nothing was touched")


class _Writer(dcp.FileSystemWriter):
    """Writes beside the folder; the coordinating rank makes room before all others write, and renames at the end."""

    def __init__(self, folder: Path, contents: Mapping[str, Any]) -> None:
        super().__init__(_beside(folder, "unfinished"))
        self._folder, self._contents = folder, contents

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan  # the folder is made by one rank, in prepare_global_plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        _check_replaceable(Path(self.path), complete=False)
        shutil.rmtree(self.path, ignore_errors=True)  # of an interrupted attempt
        Path(self.path).mkdir(parents=True)
        return super().prepare_global_plan(plans)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        unfinished = Path(self.path)
        document = {"version": _VERSION, "contents": self._contents, "tensors": _described(metadata, results)}
        with (unfinished / _DESCRIPTION).open("w") as file:
            json.dump(document, file)
            file.flush()
            os.fsync(file.fileno())
        for path in (self._folder, replaced := _beside(self._folder, "replaced")):
            _check_replaceable(path, complete=True)  # once more: writing takes a while
        shutil.rmtree(replaced, ignore_errors=True)
        if self._folder.exists():
            self._folder.rename(replaced)
        unfinished.rename(self._folder)
        shutil.rmtree(replaced, ignore_errors=True)


class _Reader(dcp.FileSystemReader):
    def __init__(self, description: Description) -> None:
        super().__init__(description.folder)
        self._description = description

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._description.metadata()


def _described(metadata: Metadata, results: list[list[WriteResult]]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata), f"{name} is no tensor"
        tensors[name] = {"dtype": str(entry.properties.dtype), "shape": list(entry.size), "chunks": []}
    sizes = {
        MetadataIndex(name, chunk.offsets): list(chunk.sizes)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
        for chunk in entry.chunks
    }
    for written in itertools.chain(*results):  # some versions of torch tell a copy of ``metadata`` where it lies
        index, info = written.index, written.storage_data
        offsets = list(index.offset or ())
        tensors[index.fqn]["chunks"].append(
            [offsets, sizes[MetadataIndex(index.fqn, offsets)], info.relative_path, info.offset, info.length]
        )
    return tensors


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f"{folder.name}.{what}")


@contextlib.contextmanager
def _plain_errors(what: str) -> Iterator[None]:
    """DCP's error is not an Exception, and it warns where no other process takes part, which is intended here."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        reasons = "; ".join(f"rank {rank}: {reason!r}" for rank, (reason, _) in sorted(error.failures.items()))
        raise RuntimeError(f"{what}: {reasons}") from error
