"""Files that appear whole or not at all, and the checksums by which readers trust them."""
