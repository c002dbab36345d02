"""Training a student against a teacher: the loss, its schedules, load balancing and the training loop."""
