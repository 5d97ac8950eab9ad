"""Hardware: devices, their peak rates, and Megatron-core on hosts without CUDA."""
