"""Many processes on one job: ranks and their mesh, expert parallelism, checkpoints read and written by shards."""
