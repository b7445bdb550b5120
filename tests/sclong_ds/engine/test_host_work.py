"""ZeRO-3's hooks stay few: a layer's Python calls are bounded in both passes of a micro-batch.

Covers `gather_at_once` of sclong_ds/engine/deepspeed_engine.py, and
sclong_ds/engine/zero3_calls.py. Counted, not timed: with the weights of each module gathered by
themselves they are 4,700 and 4,800.
"""

from benchmarks.host_time import OTHER_LAYERS, child

LAYERS = 6


def test_zero3_gathers_a_layer_with_few_calls():
    row = child("zero3", LAYERS, recompute=False)
    n = LAYERS + OTHER_LAYERS
    # Counted once: 1,510 and 1,660, what is around the layers included.
    assert row["forward_calls"] / n < 1700
    assert row["backward_calls"] / n < 1900
