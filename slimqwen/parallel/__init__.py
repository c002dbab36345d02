"""Many processes on one model: ranks and their mesh, expert parallelism, checkpoints read and written by shards."""
