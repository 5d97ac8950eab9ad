"""The DeepSpeed engine: ZeRO stages 0 to 3 with offload, for runs without pipeline stages."""
