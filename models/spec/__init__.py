"""What a model is: its input, its answers, its features and its state. No torch."""
