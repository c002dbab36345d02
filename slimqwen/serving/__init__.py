"""Requirements of serving engines (Transformers, vLLM, SGLang, llama.cpp) as data, and checks of a checkpoint against them."""
