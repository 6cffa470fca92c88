"""What the cluster wants: immutable values, pure functions, the standard library only."""
