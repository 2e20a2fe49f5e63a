"""What fits in memory, and what to choose."""
