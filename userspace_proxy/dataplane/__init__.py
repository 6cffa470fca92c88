"""The data plane: accept, pick, dial, splice. Owns every socket of clients and backends."""
