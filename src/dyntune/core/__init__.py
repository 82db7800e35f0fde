"""The ground that everything stands on: tokens, attention, errors and files; it knows no model."""
