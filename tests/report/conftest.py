from tests.support.tiny_checkpoint import checkpoint, text, tiny

__all__ = ["checkpoint", "text", "tiny"]
