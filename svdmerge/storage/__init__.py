"""Files, objects and formats: safetensors, Arrow shards, commits, Hugging Face folders."""
