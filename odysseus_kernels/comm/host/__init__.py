"""The symmetric transport of ranks that share memory on a CPU host."""
