"""Exit statuses of the training program and of srun, and what they mean for a restart.

0 done; 1 the run reported an error; 2 wrong usage; 71 a device, network or disk failed; 75 stopped
after saving.
"""

from __future__ import annotations

SRUN_STATUS = 69
"""EX_UNAVAILABLE, which slurm/pretrain.sh gives errors of srun itself; no rank ends with it."""


OWN_STATUS, PASSING_STATUS = 1, 71
"""Exit statuses: an error of the training itself; EX_OSERR, a device, network or disk gave up."""


STOP_STATUS = 75
"""Exit status of a run that saved and stopped when asked: EX_TEMPFAIL; start again to continue."""
