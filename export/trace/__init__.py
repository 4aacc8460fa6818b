"""From torch, or from a file, to the float artefacts, and that they answer alike."""
