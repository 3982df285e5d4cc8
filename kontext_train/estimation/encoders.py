"""The released frozen encoders: sizes and costs as constants, which tests count anew on the classes that run.

T5-XXL v1.1 gives the tokens, CLIP-L the pooled vector, the autoencoder the latents.
"""

T5_PARAMETERS = 4_762_310_656
CLIP_PARAMETERS = 123_060_480
AUTOENCODER_PARAMETERS = 83_819_683
T5_FLOPS_PER_TOKEN = 9_462_349_824  # at 512 tokens
CLIP_FLOPS = 13_298_503_680  # of a prompt
AUTOENCODER_FLOPS_PER_PIXEL = 4_656_384  # encoding at 1024²; its one attention makes larger images a little dearer
AUTOENCODER_PEAK_BYTES_PER_PIXEL = 1286  # encoding in bfloat16


def encoding_flops(prompts: int, t5_tokens: int, pixels: int) -> int:
    """Of a pack: forward only."""
    text = prompts * (t5_tokens * T5_FLOPS_PER_TOKEN + CLIP_FLOPS)
    return text + pixels * AUTOENCODER_FLOPS_PER_PIXEL
