"""How fast a model is beside its peers, in each runtime: every runtime in a process of its own, peers in turns."""
