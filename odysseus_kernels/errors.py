"""What a user of this package can catch.

Bad input is always a ``ValueError`` (raised before anything is sent).  What goes wrong between ranks derives from
:class:`CommunicationError`, whose message names the operator, the peer and the signal or chunk that was waited for.
"""

from __future__ import annotations

__all__ = [
    "CapacityWarning",
    "CommunicationError",
    "ExtensionNotBuiltError",
    "FallbackWarning",
    "KernelUnavailableError",
    "PeerLostError",
    "RankMismatchError",
    "SignalTimeoutError",
]


class CommunicationError(RuntimeError):
    """Ranks could not complete an operator together.

    Attributes:
        said: what the first rank that failed says of itself, with its number; empty where no rank does.
        lasting: whether the process group has to be made again.  If not, the next call of all ranks may succeed.

    Example:
        >>> try:  # ranks disagree on the number of output features
        ...     y = ody.linear_all_reduce(torch.ones(4, 8), torch.ones(2 + rank, 8), group=group)
        ... except ody.CommunicationError as error:
        ...     print(type(error).__name__, error.lasting)
        RankMismatchError False
        >>> ody.linear_all_reduce(torch.ones(4, 8), torch.ones(2, 8), group=group).shape  # the group is still usable
        torch.Size([4, 2])
    """

    def __init__(self, *args: object, said: str = "", lasting: bool = False) -> None:
        super().__init__(*args)
        self.said = said
        self.lasting = lasting


class SignalTimeoutError(CommunicationError, TimeoutError):
    """A peer that is alive did not signal within ``timeout_s``.

    Example:
        >>> pair, config, late = dist.new_group(), ody.OverlapConfig(timeout_s=0.5), False
        >>> try:
        ...     if rank == 0:  # rank 1 makes no such call
        ...         y = ody.zero3_linear(torch.ones(2, 4), torch.ones(3, 4), group=pair, config=config)
        ... except ody.SignalTimeoutError:
        ...     late = True
        >>> late == (rank == 0)
        True
    """


class PeerLostError(CommunicationError):
    """A peer's process is gone, or it gave up on the group and said why.

    Example:
        >>> model = ody.parallelize(model, mesh)
        >>> try:
        ...     with ody.step(model):
        ...         part = ody.shard_sequence(batch if rank == 0 else {}, mesh)  # fails on rank 1
        ...         loss = model(**part).loss
        ... except (ody.PeerLostError, ValueError) as error:  # the first on rank 0, the second on rank 1
        ...     print("expected input_ids" in str(error))
        True
    """


class RankMismatchError(CommunicationError, ValueError):
    """Ranks called with different operators, shapes, dtypes or settings; the message names the one that differs.

    Example:
        >>> weight = torch.ones(3, 4, dtype=torch.float64 if rank else torch.float32)
        >>> try:
        ...     y = ody.all_gather_linear(torch.ones(2, 4, dtype=weight.dtype), weight, group=group)
        ... except ody.RankMismatchError as error:
        ...     print(error)
        ranks differ in call number ...: rank 0 called all_gather_linear forward, x [2, 4] ... float32, ...; rank 1 ...
    """


class ExtensionNotBuiltError(ImportError):
    """The compiled extension, or its CUDA part, is needed and missing; the message says how to build it.

    Example:
        >>> try:
        ...     y = ody.all_gather_linear(torch.ones(2, 4), torch.ones(3, 4), group=group)
        ... except ody.ExtensionNotBuiltError as error:  # for CUDA tensors, in a build without nvcc
        ...     raise SystemExit(f"build odysseus_kernels again: {error}")
        >>> y.shape
        torch.Size([4, 3])
    """


class KernelUnavailableError(RuntimeError):
    """A kernel of ``mode="tiles"`` cannot be compiled, loaded or launched on this rank; nothing was sent.

    Example:
        >>> def multiply(mode):
        ...     config = ody.OverlapConfig(mode=mode)
        ...     return ody.all_gather_linear(torch.ones(2, 4), torch.ones(3, 4), group=group, config=config)
        >>> try:
        ...     y = multiply("tiles")
        ... except (ody.KernelUnavailableError, ValueError) as error:  # a ValueError here: these are no CUDA tensors
        ...     y = multiply("fused")
    """


class FallbackWarning(UserWarning):
    """Something slower or less strict is used, as what is preferred is not available; issued once, with the reason.

    Example:
        >>> import warnings
        >>> _ = model.resize_token_embeddings(121)  # two ranks do not divide an odd vocabulary
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", ody.FallbackWarning)  # where nothing but the preferred will do
        ...     model = ody.parallelize(model, mesh)
        Traceback (most recent call last):
        odysseus_kernels.errors.FallbackWarning: the ranks do not divide a vocabulary of 121: every rank holds ...
    """


class CapacityWarning(FallbackWarning):
    """Shared memory is too small for an operator's buffers, which then uses the collective transport.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", ody.CapacityWarning)  # stop rather than go on more slowly
        ...     y = ody.all_gather_linear(torch.ones(2, 4), torch.ones(3, 4), group=group)
        >>> y.shape  # there was room
        torch.Size([4, 3])
    """
