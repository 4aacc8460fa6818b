"""Recurrent operators as explicit cells."""
