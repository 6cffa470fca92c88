"""The nftables maps that lead packets to endpoints, and their rules: for the modes nftables and ipvs."""
