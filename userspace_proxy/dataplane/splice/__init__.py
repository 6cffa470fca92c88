"""Splice engines: each moves bytes between two connected sockets, in order and without loss."""
