"""Float32 and bfloat16 convolutions on a CPU, faster than PyTorch's own: Winograd's algorithm and packed weights."""
