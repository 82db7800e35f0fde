"""Measurements on many models: comparisons, benchmarks, searches, and their reports."""
