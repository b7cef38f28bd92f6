"""`appliance connect`: a small forwarder on a client's host, which holds the client certificate that no
stock SDK can send.

Clients speak plaintext to a loopback port; each of their connections becomes one TLS connection to the appliance.
"""
