"""Sweeps: several trainings that differ in some settings."""
