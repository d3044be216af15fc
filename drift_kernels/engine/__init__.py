"""One step of the optimizer: which parameters take part, in which launches, with which coefficients."""
