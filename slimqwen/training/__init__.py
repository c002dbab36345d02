"""Training a student with or without a teacher: the step, the loop around it, its course, its saved state."""
