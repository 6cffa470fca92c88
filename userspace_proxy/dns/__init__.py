"""Cluster DNS: answers to the names of Services, in a process of its own."""
