"""What the tensors of a graph take on, and the ranges chosen from that."""
