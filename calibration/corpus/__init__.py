"""Clips, phrases and images with their labels and sets."""
