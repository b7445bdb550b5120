"""Name under which batch scripts of earlier versions start `sclong_ds.job.preflight`."""

import runpy

if __name__ == "__main__":
    # As the program itself: it answers --help before the imports that take seconds.
    runpy.run_module("sclong_ds.job.preflight", run_name="__main__", alter_sys=True)
