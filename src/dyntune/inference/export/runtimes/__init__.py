"""The runtimes that a model can be exported to, one file each."""
