"""One run of a recipe: its stages, the store of what they make, the loop over its schedule, the checks before it."""
