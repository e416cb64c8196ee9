"""ComfyUI nodes: thin wrappers around seqlora_core.  `comfy_denoiser` and `comfy_training` alone touch ComfyUI's internals."""
