"""Convert checkpoints to and from Hugging Face folders and PEFT adapters."""

from lcdist.convert.huggingface.export_model import ExportResult, export_model
from lcdist.convert.huggingface.import_model import ImportResult, import_model
from lcdist.convert.lora.adapter import export_adapter
from lcdist.convert.lora.merge import merge, unmerge

__all__ = [
    "ExportResult",
    "ImportResult",
    "export_adapter",
    "export_model",
    "import_model",
    "merge",
    "unmerge",
]
