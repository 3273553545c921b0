"""What the commands do: one file (or two) per command that is more than a call into one room. `session.py` is that of `train`."""
