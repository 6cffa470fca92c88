"""The `lab` command: simulated pods, a node with the proxy, and a shell on a client, in private namespaces."""
