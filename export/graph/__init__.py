"""Reading, writing and naming ONNX graphs."""
