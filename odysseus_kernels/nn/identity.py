"""Whether every rank built the same model in the same way, found out with a few bytes for each tensor and setting."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist

from odysseus_kernels.comm.functional import all_gather
from odysseus_kernels.comm.mismatch import short_text, signature_hash
from odysseus_kernels.errors import PeerLostError, RankMismatchError
from odysseus_kernels.nn.group import SequenceGroup

__all__ = ["check_alike", "check_identical"]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_OPERATOR = "identity_check"
_TEXT_BYTES = 600
_SHOWN = 4  # settings that an error names; all that follow from one value may differ


def check_alike(settings: Mapping[str, str], group: SequenceGroup, error: Exception | None = None) -> None:
    """Compares settings across ranks, and tells all ranks of an error that one of them has met before.

    Args:
        settings: texts by name.
        group: all ranks that share the sequence compare.
        error: what this rank raises instead of going on.

    Raises:
        Exception: ``error``, when the others know of it.
        PeerLostError: on these, with that rank's number and text.
        RankMismatchError: naming the ranks that differ from most others, and in what.
    """
    if group.every_size == 1:
        if error is not None:
            raise error
        return
    group.withdraw()  # left over from a pass of another model that ended with an error
    text = "" if error is None else f"rank {dist.get_rank()}: {short_text(error, _TEXT_BYTES - 20)}"
    names = sorted(settings)
    said = torch.frombuffer(bytearray(text.encode().ljust(_TEXT_BYTES)), dtype=torch.int64)
    own = torch.cat((torch.tensor([len(names), signature_hash("\n".join(names))]), said))[None]
    try:
        everyone = _gathered(own, group)
    except Exception:
        if error is not None:  # the first of two errors is the one to mend
            raise error from None
        raise
    if error is not None:
        raise error
    texts = [bytes(row.contiguous().view(torch.uint8).tolist()).decode().strip() for row in everyone[:, 2:]]
    failed = [one for one in texts if one]
    if failed:
        raise PeerLostError(f"parallelize: a rank cannot go on; {'; '.join(failed)}")
    odd = _odd_ranks(everyone[:, :2])
    if odd:
        raise RankMismatchError(
            f"expected the same model on every rank, but on rank {_join(odd)} its configuration or modules have other "
            f"names (rank {group.every_rank} has {len(names)} settings); use the same class, configuration and version "
            f"of transformers on every rank"
        )
    everyone = _gathered(torch.tensor([[signature_hash(settings[name]) for name in names]]), group)
    odd = _odd_ranks(everyone)
    if odd:
        usual = next(row for rank, row in enumerate(everyone) if rank not in odd)
        differing = [names[index] for index in (everyone[odd[0]] != usual).nonzero()[:, 0].tolist()]
        shown = ", ".join(f"{name} (here {settings[name]})" for name in differing[:_SHOWN])
        more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise RankMismatchError(
            f"expected the same settings on every rank, but rank {_join(odd)} differs from the others in "
            f"{shown}{more}; build the model from the same configuration, and call parallelize alike, on every rank"
        )


def check_identical(tensors: Iterable[tuple[str, torch.Tensor]], group: SequenceGroup) -> None:
    """Compares named tensors across ranks by checksums.

    Args:
        tensors: names and full tensors, in the same order on every rank.
        group: all ranks that share the sequence compare.

    Raises:
        RankMismatchError: naming the ranks that differ from most others, and the first tensor they differ in.
    """
    named = list(tensors)
    group.withdraw()  # left over from a pass of another model that ended with an error
    outline = "\n".join(f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in named)
    digest = hashlib.blake2b(outline.encode(), digest_size=7).digest()
    # First the structure, in a message of fixed size: checksums of different numbers of tensors cannot be gathered.
    structure = torch.tensor([[len(named), int.from_bytes(digest, "little")]])
    odd = _odd_ranks(_gathered(structure, group))
    if odd:
        raise RankMismatchError(
            f"expected the same model on every rank, but on rank {_join(odd)} the names, shapes or dtypes of its "
            f"parameters differ (rank {group.every_rank} has {len(named)} tensors); build it from the same "
            f"configuration"
        )
    if not named:
        return
    checksums = torch.stack([_checksum(tensor).cpu() for _, tensor in named])[None]
    everyone = _gathered(checksums, group)
    odd = _odd_ranks(everyone)
    if odd:
        usual = next(row for rank, row in enumerate(everyone) if rank not in odd)
        differing = (everyone[odd[0]] != usual).nonzero()[:, 0].tolist()
        raise RankMismatchError(
            f"expected the same weights on every rank, but rank {_join(odd)} differs from the others in "
            f"{len(differing)} of {len(named)} tensors, {named[differing[0]][0]!r} first; call torch.manual_seed with "
            f"the same seed, or load the same checkpoint, before building the model on each rank"
        )


def _checksum(tensor: torch.Tensor) -> torch.Tensor:
    """A 64-bit sum of the tensor's bits, in which the order of its rows counts."""
    bits = tensor.detach().contiguous().reshape(tensor.shape[0] if tensor.ndim else 1, -1)
    bits = bits.view(_INTEGERS[bits.element_size()])
    rows = bits.sum(dim=1, dtype=torch.int64)
    return (rows * (2 * torch.arange(rows.shape[0], device=rows.device) + 1)).sum()


def _gathered(row: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
    device = torch.device(group.mesh.device_type)
    return all_gather(row.to(device), group.everyone, operator=_OPERATOR, config=group.config).cpu()


def _odd_ranks(rows: torch.Tensor) -> list[int]:
    """Ranks whose row is not the most common one; of equally common ones the lowest rank's counts."""
    keys = [tuple(row) for row in rows.tolist()]
    usual = max(Counter(keys).items(), key=lambda item: (item[1], -keys.index(item[0])))[0]
    return [rank for rank, key in enumerate(keys) if key != usual]


def _join(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
