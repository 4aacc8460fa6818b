"""What a model is given: recordings, a microphone, phrases and images."""
