"""A packet's way: which hooks, chains and rules the kernel says that it met, as a tree and as a drawing."""
