"""Export of retrofitted networks for other programs: ONNX, torch.export, and plain Python source."""

from .export import FORMATS, export

__all__ = ["FORMATS", "export"]
