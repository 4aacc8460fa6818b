"""What was found, on one page and on the terminal."""
