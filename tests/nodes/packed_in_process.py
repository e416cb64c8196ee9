"""Run by ComfyUI's own python (not by pytest): the demo's denoiser as a GGUF file of 8 bits a number.

argv: the demo model, the file to write.
"""

import sys

import gguf
from safetensors.torch import load_file

PREFIX, PACKED, PLAIN = "model.diffusion_model.", gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32

writer = gguf.GGUFWriter(sys.argv[2], "sd3")
for name, weight in load_file(sys.argv[1]).items():
    if name.startswith(PREFIX):
        kind = PACKED if name.endswith(".weight") and weight.ndim == 2 and weight.shape[1] % 32 == 0 else PLAIN
        writer.add_tensor(name.removeprefix(PREFIX), gguf.quants.quantize(weight.float().numpy(), kind), raw_dtype=kind)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
