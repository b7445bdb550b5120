"""What is written of perturbed cells."""
