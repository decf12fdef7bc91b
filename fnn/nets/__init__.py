"""Layers, what combines them, losses, and whole nets."""
