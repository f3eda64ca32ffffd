"""How ranks connect the links of ``comm/collective/links.py``: addresses and tokens exchanged through their group.

Every rank listens, on the address that Gloo would take, tells the others where, and connects to each of them.  A
connection counts once it has brought the random token of the rank that it came to; any other is closed.  All ranks use
the links or none does.
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import json
import secrets
import selectors
import socket
import struct
import time
import warnings
from collections.abc import Callable

from odysseus_kernels.comm.collective.links import Links
from odysseus_kernels.config import socket_interface
from odysseus_kernels.errors import FallbackWarning

__all__ = ["accept_peers", "connect_links", "interface_address", "listen"]

_TOKEN_BYTES = 16
# Token of the rank that is connected to, number of the rank that connects.
_HELLO = struct.Struct(f"<{_TOKEN_BYTES}sI")
_CONNECT_S = 5.0
_INTERFACE_ADDRESS = 0x8915  # SIOCGIFADDR of Linux
_REASON_CHARACTERS = 300


def connect_links(
    rank: int, names: list[int], exchange: Callable[[str], list[str]], timeout_s: float, group_name: str
) -> Links | None:
    """Links between all ranks of a group, or None, with a warning, where a rank cannot connect.  All ranks call it.

    Args:
        rank: this rank's number in the group.
        names: ranks' numbers in the default process group.
        exchange: gives every rank's text.
        timeout_s: limit of a wait of the group.
        group_name: for the warning.
    """
    limit = min(_CONNECT_S, timeout_s / 2)  # peers wait for this rank's text no longer than timeout_s
    with contextlib.ExitStack() as opened:
        token = secrets.token_bytes(_TOKEN_BYTES)
        host, port, why = "", 0, ""
        listener = None
        try:
            listener = opened.enter_context(listen(len(names)))
            host, port = listener.getsockname()[:2]
        except OSError as error:
            why = _reason(names[rank], "cannot listen", error)
        told = [json.loads(text) for text in exchange(json.dumps([host, port, token.hex(), why]))]
        reasons = [text for *_, text in told if text]
        if not reasons:
            assert listener is not None
            leaving: dict[int, socket.socket] = {}
            arriving: dict[int, socket.socket] = {}
            deadline = time.monotonic() + limit
            try:
                for peer, (peer_host, peer_port, peer_token, _) in enumerate(told):
                    if peer != rank:
                        leaving[peer] = opened.enter_context(
                            _reach(peer_host, peer_port, _HELLO.pack(bytes.fromhex(peer_token), rank), deadline)
                        )
                arriving = accept_peers(listener, token, set(leaving), deadline)
            except OSError as error:
                why = _reason(names[rank], "cannot connect", error)
            for connection in arriving.values():
                opened.enter_context(connection)
            reasons = [text for text in exchange(why) if text]
            if not reasons:
                listener.close()
                opened.pop_all()
                return Links(leaving, arriving, names)
    warnings.warn(
        f"process group {group_name}: no TCP connections between its ranks, whose data travels by the group's "
        f"collectives, which use a link's two directions in turn: {reasons[0]}; GLOO_SOCKET_IFNAME chooses the "
        f"interface, and a firewall has to let ranks through to one another",
        FallbackWarning,
        stacklevel=2,
    )
    return None


def listen(backlog: int) -> socket.socket:
    """A socket that listens where Gloo would: on GLOO_SOCKET_IFNAME, the host name's address, or the loopback.

    Raises:
        OSError: the interface has no IPv4 address.
    """
    interface = socket_interface()
    if interface:
        return _listen_on(socket.AF_INET, (interface_address(interface), 0), backlog)
    with contextlib.suppress(OSError):
        for family, *_, address in socket.getaddrinfo(socket.gethostname(), 0, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError):  # not an address of this host
                return _listen_on(family, address, backlog)
    return _listen_on(socket.AF_INET, ("127.0.0.1", 0), backlog)


def accept_peers(listener: socket.socket, token: bytes, peers: set[int], deadline: float) -> dict[int, socket.socket]:
    """One connection from each of ``peers``; those without the token, or from others, are closed.

    Raises:
        TimeoutError: a peer did not connect before ``deadline`` (of ``time.monotonic``).
    """
    found: dict[int, socket.socket] = {}
    hellos: dict[socket.socket, bytes] = {}
    listener.setblocking(False)
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as opened:
        selector.register(listener, selectors.EVENT_READ)
        while len(found) < len(peers):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"{len(peers) - len(found)} of {len(peers)} peers did not connect in time")
            for key, _ in selector.select(left):
                one = key.fileobj
                assert isinstance(one, socket.socket)
                if one is listener:
                    with contextlib.suppress(OSError):  # gone again
                        connection = opened.enter_context(listener.accept()[0])
                        connection.setblocking(False)
                        hellos[connection] = b""
                        selector.register(connection, selectors.EVENT_READ)
                    continue
                try:
                    more = one.recv(_HELLO.size - len(hellos[one]))
                except OSError:
                    more = b""
                hellos[one] += more
                if more and len(hellos[one]) < _HELLO.size:
                    continue
                selector.unregister(one)
                hello = hellos.pop(one)
                claimed, peer = _HELLO.unpack(hello) if len(hello) == _HELLO.size else (b"", -1)
                if hmac.compare_digest(claimed, token) and peer in peers and peer not in found:
                    one.setblocking(True)
                    found[peer] = one
                else:
                    one.close()
        for stranger in hellos:
            stranger.close()
        opened.pop_all()
    return found


def _reach(host: str, port: int, hello: bytes, deadline: float) -> socket.socket:
    connection = socket.create_connection((host, port), max(deadline - time.monotonic(), 0.01))
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(hello)
        connection.setblocking(True)
    except OSError:
        connection.close()
        raise
    return connection


def _listen_on(family: int, address: tuple[object, ...], backlog: int) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.bind(address)
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    return listener


def interface_address(interface: str) -> str:
    """IPv4 address of a network interface.

    Raises:
        OSError: it has none, or there is no such interface.
    """
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            return socket.inet_ntoa(fcntl.ioctl(asking.fileno(), _INTERFACE_ADDRESS, request)[20:24])
        except OSError as error:
            raise OSError(error.errno, f"interface {interface} has no IPv4 address ({error.strerror})") from error


def _reason(name: int, what: str, error: OSError) -> str:
    return f"rank {name} {what}: {error.strerror or error}"[:_REASON_CHARACTERS]
