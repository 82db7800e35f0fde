"""Pictures that are drawn instead of read, and the tasks made of them."""
