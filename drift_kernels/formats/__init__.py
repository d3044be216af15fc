"""Storage formats of numbers: rounding, random bits, blocks of codes with a scale."""
