"""A corpus that consists of several, as one."""
