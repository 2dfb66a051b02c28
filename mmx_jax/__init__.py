"""Lightning-attention mixture-of-experts models in JAX."""

__version__ = "0.1.0"
__all__ = ["from_pretrained"]


def __getattr__(name):
    # Imported when asked for, so that a config costs no jax.
    if name == "from_pretrained":
        from mmx_jax.inference.model import from_pretrained

        return from_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
