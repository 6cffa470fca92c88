"""A data plane under a simulated clock, network and kernel, driven by a seed."""
