"""What ranks tell one another of their calls and errors, and what is said where calls differ."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter

from odysseus_kernels.errors import CommunicationError

__all__ = ["departure", "describe_mismatch", "short_text", "signature_hash"]


@functools.lru_cache(maxsize=4096)
def signature_hash(signature: str) -> int:
    """A 63-bit hash that is equal in every process (``hash`` is not) and fits a signed integer of a collective."""
    return int.from_bytes(hashlib.blake2b(signature.encode(), digest_size=8).digest(), "little") >> 1


def short_text(error: BaseException, most: int = 600) -> str:
    """An error in a line of ASCII that fits what ranks exchange."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".encode("ascii", "replace").decode()[:most]


def departure(name: int, what: str, error: BaseException) -> str:
    """What rank ``name`` says of itself where ``error`` ends its part: passed on as it is where it came from a peer."""
    if isinstance(error, CommunicationError) and error.said:
        return error.said
    text = " ".join(str(error).split()) if isinstance(error, CommunicationError) else short_text(error)
    return f"rank {name} {what}: {text}"


def describe_mismatch(calls: dict[int, tuple[int, str]], sequence: int) -> str:
    """Says which ranks' calls differ from the majority's, and what each called.

    ``calls`` maps each rank that is known to have begun call number ``sequence`` to the hash of its signature and the
    signature as far as it was transmitted.
    """
    counts = Counter(digest for digest, _ in calls.values())
    common, votes = counts.most_common(1)[0]
    odd = {rank: text for rank, (digest, text) in calls.items() if digest != common}
    agreed = {rank: text for rank, (digest, text) in calls.items() if digest == common}
    if votes > len(odd):
        which = f"rank {next(iter(odd))} differs" if len(odd) == 1 else f"ranks {', '.join(map(str, odd))} differ"
        listed = "; ".join(f"rank {rank} called {text}" for rank, text in odd.items())
        ranks = ("ranks " if len(agreed) > 1 else "rank ") + ", ".join(map(str, agreed))
        return f"{which} in call number {sequence}: {listed}; {ranks} called {next(iter(agreed.values()))}"
    listed = "; ".join(f"rank {rank} called {text}" for rank, (_, text) in calls.items())
    return f"ranks differ in call number {sequence}: {listed}"
