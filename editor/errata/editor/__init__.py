"""Locate, correct and insert facts in multimodal and text language models in closed form."""
