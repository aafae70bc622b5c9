"""Pretrained models: loading, quantization, offloading, losses over large vocabularies."""
