"""Throw-away machines with a really booted systemd: their roots, the machines themselves, what is asked of them."""
