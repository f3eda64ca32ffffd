"""What all benchmarks share: the machine, rounds and medians, ranks, memory."""
