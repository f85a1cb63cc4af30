"""Read and write safetensors files, and folders of them as Hugging Face lays them out."""
