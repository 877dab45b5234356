"""The places for bytes, one module each; `components.shared.storage` chooses among them by the URI."""
