"""On-policy batches: sample, score, yield. Filled by the align stages."""
