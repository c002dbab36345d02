"""What shapes there are between a model and nothing, and what each costs: counts and bytes from config.json alone."""
