"""A tuned model: how it is put together and run, what it costs, and how it is saved."""
