"""``python -m dyntune``: the same as ``dyntune``."""

from dyntune.commands.main import main

if __name__ == "__main__":
    main()
