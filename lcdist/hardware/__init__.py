"""Devices, data sheets and peak rates, and Megatron-core on hosts without CUDA."""
