"""API objects -> desired state -> sync: everything that is decided off the packet path."""
