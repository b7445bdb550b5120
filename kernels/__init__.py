"""Fused operators of the Performers.

`reference.py` holds the one definition of each operator in plain torch.
"""
