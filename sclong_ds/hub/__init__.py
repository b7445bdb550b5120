"""Models that lie elsewhere: on the Hugging Face hub, or on a web server."""
