"""What every Triton kernel shares: addresses of blocks, online softmax, stored numbers."""
