"""Tests of Triton kernels in Triton's interpreter.

It must be chosen before Triton is imported, so they run in a process of their own: `tests/kernels/test_interpreted.py`.
"""
