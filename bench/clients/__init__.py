"""Programs that call a running server through another project's client library, each in a venv that has the library."""
