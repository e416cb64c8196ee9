"""ComfyUI nodes: thin wrappers around seqlora_core.  `comfy_denoiser` alone touches ComfyUI's internals."""
