"""A shorter way for chats and completions that are text alone. Every other request takes vLLM's way through its app."""
