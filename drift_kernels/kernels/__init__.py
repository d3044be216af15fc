"""The update on a device: plans, coefficients, the reference implementation, and the backends."""
