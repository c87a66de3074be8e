"""What the commands do: the wings joined into stages. Each stage is a frozen config and a function of it; `scripts/` only parses and calls."""
