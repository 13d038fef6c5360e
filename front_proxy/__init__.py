"""The front proxy: OpenAI's API and Baton's gRPC API in front of remote engines. It drives every request."""
