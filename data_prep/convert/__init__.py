"""Many datasets in worker processes, each within its limits, restartable."""
