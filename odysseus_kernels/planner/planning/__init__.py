"""Which strategy and which mesh for a model, a length and a machine: predictions, no device and no process group."""
