"""The OpenAI server: vLLM's application, its guard and its connections."""
