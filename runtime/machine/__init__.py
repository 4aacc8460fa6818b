"""This machine: what it is, what loads on it, and what to do for the rest."""
