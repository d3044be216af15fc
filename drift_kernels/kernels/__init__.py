"""What runs on a device: plans, coefficients, the reference, and the backends."""
