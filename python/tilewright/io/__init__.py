"""Reading model files: GGUF, safetensors, Hugging Face folders, tokenizers; downloading known models."""
