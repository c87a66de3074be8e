"""What the commands do: the wings joined into stages, each a frozen config and a function of it. No parsing."""
