"""Kernels for sparse training that are imported for their own sake: torch and triton only.

There are none yet: every layer runs on torch's own operators, and zeros of a mask are multiplied like other numbers.
"""
