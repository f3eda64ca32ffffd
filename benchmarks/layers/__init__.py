"""Whole layers and small models under every strategy, beside what a user would pick instead."""
