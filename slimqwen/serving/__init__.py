"""Where a checkpoint loads: what Transformers, vLLM, SGLang and llama.cpp take, as data, and the command `check`."""
