"""Name under which batch scripts of earlier versions start `sclong_ds.job.restarts`."""

import sys

from sclong_ds.job.restarts import main

if __name__ == "__main__":
    sys.exit(main())
