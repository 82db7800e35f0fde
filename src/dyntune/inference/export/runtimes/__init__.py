"""One file for each runtime; a module here is found by being there (see ``dyntune.inference.export.registry``)."""
