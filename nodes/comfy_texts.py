"""The text encoders of a CLIP link by themselves, as far as `seqlora_core.embedding` asks for them."""

from ..seqlora_core.attach import Site
from .comfy_sites import token_tables


class Texts:
    """clip: without LoRAs; once it has encoded something ComfyUI has taken those of other links off its weights"""

    def __init__(self, clip):
        self.clip = clip

    def token_tables(self) -> list[Site]:
        return token_tables(self.clip)

    def read_prompts(self, prompts: list[str]) -> None:
        for prompt in prompts:
            self.clip.encode_from_tokens(self.clip.tokenize(prompt))
