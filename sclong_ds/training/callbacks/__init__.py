"""Python code of the caller's, called while a run trains."""
