"""Families of host models behind the backbone interface, one file each."""
