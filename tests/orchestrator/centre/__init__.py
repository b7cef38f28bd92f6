"""A central orchestrator to test against: Clarifai's RPCs for compute, models and runner items over the real protos.

It is written from what the stock runner and SDK were seen to send and to accept (tests/orchestrator/README.md has the
list of what is observed and what is assumed), runs as a process of its own, and is told what to do, faults included,
over a unix socket.
"""
