"""Name under which batch scripts of earlier versions start `sclong_ds.job.preflight`."""

from sclong_ds.job.failures import run_to_end
from sclong_ds.job.preflight import main

if __name__ == "__main__":
    run_to_end(main)
