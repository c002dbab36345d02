"""Two models walked through the same text side by side, layer by layer: one layer of each in memory, hidden states in files."""
