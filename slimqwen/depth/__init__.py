"""Which layers can go, measured by leaving them out."""
