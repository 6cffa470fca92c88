"""`userspace-proxy compare`: every mode side by side on this machine, and what that says about the textbooks."""
