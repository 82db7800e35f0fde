"""What is put on a backbone: tuning methods, token policies and presets, and the way they are written."""
