"""How parameters and optimizer states are held, and how they are saved and loaded."""
