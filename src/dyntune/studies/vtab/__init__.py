"""VTAB-1K and benchmarks of its form: many small tasks, several methods and seeds, one table."""
