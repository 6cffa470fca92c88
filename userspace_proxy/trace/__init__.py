"""Traces a packet through the kernel's hooks, chains and rules, and shows its path as a tree or a drawing."""
