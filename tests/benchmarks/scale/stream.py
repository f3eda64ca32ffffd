"""A rank that sends, and one that receives and reports bits per second; without torch, which takes seconds to start."""

from __future__ import annotations

import os
import socket
import sys
import time

megabytes, report = float(sys.argv[1]), int(sys.argv[3])
address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
if os.environ["RANK"] == "0":
    with socket.create_server(address) as server:
        connection, _ = server.accept()
    received, begin = len(connection.recv(1 << 20)), time.perf_counter()
    while got := len(connection.recv(1 << 20)):
        received += got
    rate = 8 * received / (time.perf_counter() - begin)
    # Of the end that accepts; the other end takes it from the same route.
    control = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()
    os.write(report, f"{rate} {control}".encode())
else:
    for _ in range(200):
        try:
            connection = socket.create_connection(address, 5)
            break
        except OSError:
            time.sleep(0.05)
    connection.sendall(bytes(int(megabytes * 1e6)))
    connection.close()
