"""Call `finetune` once for each line of arguments, in one process: `python tests/finetune_each.py
FILE`.

FILE holds a JSON list of [arguments, step to stop after, or null]. Prints the exit statuses as
JSON, on the last line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sclong_ds.__main__ import main
from sclong_ds.finetune import fit
from sclong_ds.job.signals import StopRequest

statuses = []
for words, stop_after in json.loads(Path(sys.argv[1]).read_text()):
    made, step = 0, fit._step

    def counted(*args: object, _step=step, _last=stop_after) -> float:
        global made
        made += 1
        StopRequest.reason = lambda _: "the test" if _last is not None and made >= _last else None
        return _step(*args)

    fit._step = counted
    statuses.append(main(["finetune", *words]))
    fit._step, StopRequest.reason = step, lambda _: None
sys.stdout.write(f"{json.dumps(statuses)}\n")
