"""Netfilter access shared by several modes: sets, rule text, conntrack and the kernel's notices."""
