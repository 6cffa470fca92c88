"""`python -m userspace_proxy` is the same program as `userspace-proxy`."""

from userspace_proxy.cli import main

if __name__ == "__main__":
    main()
