"""A module or an ONNX file of a user's own."""
