"""Tune ChatGLM-6B with LoRA and P-Tuning v2 on current libraries."""

__version__ = "1.0.0"
