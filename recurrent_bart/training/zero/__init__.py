"""DeepSpeed's ZeRO engine: its configuration, patches and gradient accumulation."""
