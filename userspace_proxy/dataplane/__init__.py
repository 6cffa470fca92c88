"""Sockets: accept, pick, dial, splice. Owns every descriptor that clients and backends touch."""
