"""Device code of fused-losses: Triton kernels and their launchers.

Knows tensors only: no loss by name, no autograd, no public API. Nothing here is imported unless the
Triton backend is asked for, except ``language`` and ``elementary``, which also load without Triton.
"""
