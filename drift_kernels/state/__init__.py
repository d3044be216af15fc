"""Storing, saving and loading parameters and optimizer states."""
