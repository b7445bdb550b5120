"""What the Slurm scripts call: preflight checks, restarts and how a run ended."""
