"""The options of commands that serve: names, values, help. Names are kube-proxy's where the meaning is the same."""
