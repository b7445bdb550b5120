"""Fused operators of the Performers.

`reference.py` holds the one definition of each operator and its torch entries, `favor_torch.py`
computes them in plain torch; `favor_attention.py` is the operator the model calls, with Triton
kernels (`favor_forward.py`, `favor_backward.py`, called by `favor_launch.py` with the block sizes
of `favor_plan.py`) on a GPU.
`softmax_attention.py` is exact attention.
"""
