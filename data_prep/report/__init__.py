"""The quality report of a corpus: figures and one HTML page."""
