"""Rule languages: pure text in nft.py and iptables.py; the kernel is touched in kernel.py and network.py alone."""
