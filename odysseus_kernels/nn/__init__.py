"""Layers of the strategies, independent of where the model comes from."""
