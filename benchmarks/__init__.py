"""One file per measured claim: each prints a table and writes JSON with device and versions."""
