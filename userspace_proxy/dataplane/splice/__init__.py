"""Engines: each moves bytes between two connected sockets, and keeps every one of them in order."""
