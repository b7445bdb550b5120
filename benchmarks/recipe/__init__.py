"""What makes the small model learn: candidate recipes trained side by side on real cells.

`python -m benchmarks.recipe --help` says how to run it.
"""
