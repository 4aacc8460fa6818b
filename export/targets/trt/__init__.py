"""TensorRT: quantizing, rules, half precision, building and the receipt."""
