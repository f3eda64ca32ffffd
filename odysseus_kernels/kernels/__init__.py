"""Triton kernels whose tiles wait for data that is still arriving, or send what they make.  The only home of Triton.

Importing this package does not import Triton; its kernel modules do.
"""
