"""Modes: each makes a ProxyState true in its own way."""
