"""Recordings, and the ranges that a network takes on them."""
