"""The wire beside other gRPC servers: what one request costs each of them on one core."""
