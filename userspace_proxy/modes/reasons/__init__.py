"""Parts of the reasons of rules that all modes use."""
