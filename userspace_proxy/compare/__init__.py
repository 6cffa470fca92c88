"""The `compare` command: measures every mode on this machine and judges the claims of textbooks by the results."""
