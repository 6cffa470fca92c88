"""Desired state as immutable values and pure functions. Imports the standard library only."""
