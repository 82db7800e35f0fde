"""Families of host models, one file each, that implement the interface in ``backbones/base.py``."""
