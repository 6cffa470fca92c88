"""Mode nftables: the kernel translates by the maps of `modes/slots`."""
