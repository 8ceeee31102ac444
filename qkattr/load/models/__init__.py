"""Models from files: Hugging Face folders, GGUF files and trees of JAX programs."""
