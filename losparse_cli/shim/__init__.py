"""The loader that travels with every checkpoint: torch, transformers and safetensors, nothing of ours."""
