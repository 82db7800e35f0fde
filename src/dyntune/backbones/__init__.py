"""Backbones: the interface that methods are written against, and the host families that implement it."""
