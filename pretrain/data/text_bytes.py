"""How much text a model's tokens stand for: what turns nats per token into bits per byte."""

from __future__ import annotations

from pretrain.data.dataset import BlendedDataset
from pretrain.data.tokenizer import load_tokenizer, token_byte_lengths


def bytes_per_token(dataset: BlendedDataset, samples: int) -> float | None:
    """Mean UTF-8 bytes per predicted token over the first `samples` samples.

    None when a source has no sidecar that names its tokenizer, as foreign Megatron datasets have none.
    """
    source = dataset.sources[0]
    if source.sidecar is None or any(other.sidecar is None for other in dataset.sources):
        return None
    # One tokenizer serves all sources of a blend: `open_blend` has checked it.
    lengths = token_byte_lengths(load_tokenizer(source.prefix.with_name(source.sidecar.tokenizer.file)))
    predicted = [dataset[sample][1:].numpy() for sample in range(samples)]
    return float(sum(lengths[tokens].sum() for tokens in predicted) / sum(len(tokens) for tokens in predicted))
