"""Training the models of each family."""
