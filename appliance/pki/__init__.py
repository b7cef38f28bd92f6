"""Certificates: a root for sites without one, leaves, certificate requests, inspection, import.

`inspect` is what the daemon reads with; the rest is for `appliance certs`. This room sees only `core.errors`.
"""
