"""What every room needs and knows nothing of models: errors, the terminal, progress, warnings, memory, units."""
