"""Numbers as they are stored: rounding, random bits, blocks of codes with a scale."""
