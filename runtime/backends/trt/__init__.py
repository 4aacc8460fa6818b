"""TensorRT and TensorRT-RTX: library, engine file, CUDA and sessions."""
