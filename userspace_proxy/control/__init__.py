"""Wishes -> state -> sync: everything that is decided off the packet path."""
