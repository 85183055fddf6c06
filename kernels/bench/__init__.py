"""Benchmarks: cases register themselves, one runner times them in interleaved pairs and prints one table."""
