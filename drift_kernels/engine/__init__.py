"""One step: who takes part, in which launches, with which coefficients."""
