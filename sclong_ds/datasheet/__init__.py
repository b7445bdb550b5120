"""What a corpus tells about its data: where they come from, and whether they can be trusted."""
