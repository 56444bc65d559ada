"""Sites, deltas and variants as tensors; safetensors on disk; low-rank algebra; what `needs` may name."""
