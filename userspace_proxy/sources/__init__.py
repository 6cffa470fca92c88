"""Where wishes come from, one file per Source."""
