"""What runs: a base loaded, rows made into batches, the training loop, generation for many variants."""
