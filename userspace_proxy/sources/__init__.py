"""Sources of the desired state, one file for each Source."""
