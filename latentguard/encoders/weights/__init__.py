"""The bundled nano weights (data only)."""
