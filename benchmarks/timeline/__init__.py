"""When each rank of a step computes, waits, sends and receives: ``overlap.py --timeline``."""
