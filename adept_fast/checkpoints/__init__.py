"""Models on disk: loading, safetensors headers, byte copies, tensor names, digests, the record."""
