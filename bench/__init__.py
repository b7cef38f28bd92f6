"""Benchmarks: what the appliance serves beside what its hardware can do. They print figures and assert none."""
