"""Whether a device answers as the float model does: golden clips and a shadow."""
