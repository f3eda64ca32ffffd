"""The collective transport: asynchronous collectives of a process group."""
