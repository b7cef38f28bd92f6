"""What tests share: graphs, pictures, a running appliance."""
