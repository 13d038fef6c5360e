"""Identity and context of a request, resolved before either API."""
